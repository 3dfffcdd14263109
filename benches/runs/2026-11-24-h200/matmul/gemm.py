import ctypes as C, torch, time, sys, json
lt = None
import glob, os
base = os.path.dirname(torch.__file__)
for p in glob.glob(base + "/../nvidia/*/lib/libcublasLt.so*"):
    lt = C.CDLL(p)
dev = "cuda"; torch.manual_seed(0)
h = C.c_void_p(); assert lt.cublasLtCreate(C.byref(h)) == 0
ws = torch.empty(64 << 20, dtype=torch.uint8, device=dev)
class Res(C.Structure):
    _fields_ = [("algo", C.c_uint64 * 8), ("ws", C.c_size_t), ("state", C.c_int), ("waves", C.c_float), ("r", C.c_int * 4)]
def layout(kind, r, c, ld):
    l = C.c_void_p(); assert lt.cublasLtMatrixLayoutCreate(C.byref(l), kind, C.c_uint64(r), C.c_uint64(c), C.c_int64(ld)) == 0; return l
BF, F32 = 14, 0
T = 32768
def rnd(*s): return torch.randn(*s, device=dev, dtype=torch.bfloat16)
def timed(f, n=12):
    for _ in range(2): f()
    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a.record()
    for _ in range(n): f()
    b.record(); torch.cuda.synchronize(); return a.elapsed_time(b) / n
def problem(name, m, n, k, ta, tb, beta, outf32=False, wsize=32 << 20):
    A = rnd(k, m) if not ta else rnd(m, k)   # row-major views of column-major: N: m x k col-major = [k, m] row-major
    B = rnd(n, k) if not tb else rnd(k, n)
    out = torch.zeros(n, m, device=dev, dtype=torch.float32 if outf32 else torch.bfloat16)
    c = torch.zeros_like(out)
    am = A.t() if not ta else A   # m x k
    bm = B.t() if not tb else B   # k x n
    ref = lambda: (torch.mm(bm.t(), am.t(), out=out) if beta == 0 else torch.addmm(out, bm.t(), am.t(), out=out)) if not outf32 else None
    flop = 2.0 * m * n * k
    t0 = timed(ref) if not outf32 else float("nan")
    d = C.c_void_p(); lt.cublasLtMatmulDescCreate(C.byref(d), 68, F32)
    for attr, v in ((3, ta), (4, tb)):
        x = C.c_int(v); lt.cublasLtMatmulDescSetAttribute(d, attr, C.byref(x), C.c_size_t(4))
    la = layout(BF, k if ta else m, m if ta else k, k if ta else m)
    lb = layout(BF, n if tb else k, k if tb else n, n if tb else k)
    lc = layout(F32 if outf32 else BF, m, n, m)
    pref = C.c_void_p(); lt.cublasLtMatmulPreferenceCreate(C.byref(pref))
    w = C.c_uint64(wsize); lt.cublasLtMatmulPreferenceSetAttribute(pref, 1, C.byref(w), C.c_size_t(8))
    res = (Res * 24)(); got = C.c_int()
    s = lt.cublasLtMatmulAlgoGetHeuristic(h, d, la, lb, lc, lc, pref, 24, res, C.byref(got))
    one, be = C.c_float(1.0), C.c_float(beta)
    st = C.c_void_p(torch.cuda.current_stream().cuda_stream)
    times = []
    for i in range(got.value):
        def call(i=i, cin=out):
            r = lt.cublasLtMatmul(h, d, C.byref(one), C.c_void_p(A.data_ptr()), la, C.c_void_p(B.data_ptr()), lb, C.byref(be),
                C.c_void_p(cin.data_ptr()), lc, C.c_void_p(out.data_ptr()), lc, C.byref(res[i].algo), C.c_void_p(ws.data_ptr()), C.c_size_t(wsize), st)
            if r: raise RuntimeError(r)
        try: times.append((timed(call, 6), i))
        except RuntimeError as e: times.append((1e9, i))
    order = sorted(times)
    again = [(timed(lambda i=i: lt.cublasLtMatmul(h, d, C.byref(one), C.c_void_p(A.data_ptr()), la, C.c_void_p(B.data_ptr()), lb, C.byref(be),
                C.c_void_p(out.data_ptr()), lc, C.c_void_p(out.data_ptr()), lc, C.byref(res[i].algo), C.c_void_p(ws.data_ptr()), C.c_size_t(wsize), st), 12), i) for _, i in order[:4]]
    outp = float("nan")
    if beta:
        i = min(again)[1]
        outp = timed(lambda: lt.cublasLtMatmul(h, d, C.byref(one), C.c_void_p(A.data_ptr()), la, C.c_void_p(B.data_ptr()), lb, C.byref(be),
                C.c_void_p(c.data_ptr()), lc, C.c_void_p(out.data_ptr()), lc, C.byref(res[i].algo), C.c_void_p(ws.data_ptr()), C.c_size_t(wsize), st))
    t1 = timed(ref) if not outf32 else float("nan")
    tf = lambda t: flop / t / 1e9
    first = times[0][0] if times else float("nan")
    print(f"{name:22s} m{m} n{n} k{k} torch {t0:.3f} {t1:.3f} ms ({tf(t0):.0f} {tf(t1):.0f} TF) lt0 {first:.3f} ({tf(first):.0f}) best " +
          " ".join(f"#{i} {t:.3f} ({tf(t):.0f})" for t, i in sorted(again)) + f" other C {outp:.3f}  n={got.value}", flush=True)
x = rnd(8192, 8192)
for _ in range(300): y = x @ x
torch.cuda.synchronize()
E, F, V, CH = 2048, 8192, 128256, 4096
problem("fwd q", E, T, E, 1, 0, 0)
problem("fwd qkv", 3 * E, T, E, 1, 0, 0)
problem("fwd o +res", E, T, E, 1, 0, 1)
problem("fwd gate", F, T, E, 1, 0, 0)
problem("fwd gate|up", 2 * F, T, E, 1, 0, 0)
problem("fwd down +res", E, T, F, 1, 0, 1)
problem("dx q", E, T, E, 0, 0, 0)
problem("dx q +", E, T, E, 0, 0, 1)
problem("dx qkv", E, T, 3 * E, 0, 0, 0)
problem("dx gate", E, T, F, 0, 0, 0)
problem("dx gate +", E, T, F, 0, 0, 1)
problem("dx gate|up", E, T, 2 * F, 0, 0, 0)
problem("dx down", F, T, E, 0, 0, 0)
problem("dw q", E, E, T, 0, 1, 1)
problem("dw q set", E, E, T, 0, 1, 0)
problem("dw qkv", E, 3 * E, T, 0, 1, 1)
problem("dw gate", E, F, T, 0, 1, 1)
problem("dw gate set", E, F, T, 0, 1, 0)
problem("dw gate|up", E, 2 * F, T, 0, 1, 1)
problem("dw down", F, E, T, 0, 1, 1)
problem("logits", V, CH, E, 1, 0, 0)
problem("logits 8192", V, 2*CH, E, 1, 0, 0)
problem("dx logits", E, CH, V, 0, 0, 0)
problem("dw logits f32", E, V, CH, 0, 1, 1, True)
problem("dw logits bf16", E, V, CH, 0, 1, 1)
