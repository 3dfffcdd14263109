"""flash-linear-attention's causal linear attention on one NVIDIA GPU: a JSON line for each decay and length.

    python3 benches/peers/linear_attention.py --tokens 16384,131072 --decays none,head

Times are medians of CUDA events around one call, the L2 cache overwritten before each, for so long that the GPU does not wait
for launches; as in `target/release/gpu`. Memory is the peak of the allocator above what was allocated before a forward and
backward pass. Needs PyTorch, Triton and flash-linear-attention. A decay that this version refuses, or takes of no packed
documents, is a line with an error.

Triton compiles what it chooses from one after another, for minutes. With --compile-jobs N so many processes first compile a share each,
which Triton's cache keeps; the choice is then made among all, by one process, as ever.
"""

import argparse
import inspect
import itertools
import json
import math
import os
import statistics
import subprocess
import sys

import fla
import torch
import triton
from fla.ops.gla import chunk_gla
from fla.ops.linear_attn import chunk_linear_attn
from fla.ops.retention import chunk_retention
from fla.ops.simple_gla import chunk_simple_gla
from triton.runtime.autotuner import Autotuner


# Tokens that every document has, and the proportions of the rest; as in `target/release/gpu`.
AT_LEAST = 64
PROPORTIONS = [1, 6, 2, 12, 3]

# So often the L2 cache is overwritten before each run: 2 ms, in which the host launches all of it; as in `target/release/gpu`.
OVERWRITTEN = 32


def cu_seqlens(tokens, documents):
    """Where documents begin and end, [N + 1]."""
    shares = [0, *itertools.accumulate(itertools.islice(itertools.cycle(PROPORTIONS), documents))]
    rest = tokens - AT_LEAST * documents
    return [AT_LEAST * n + rest * share // shares[-1] for n, share in enumerate(shares)]


def operator(decay, x):
    """A function of q, k, v, for inputs as `inputs` makes them, and the name of what it calls."""
    call, given = {
        "none": (chunk_linear_attn, {"normalize": False}),
        "head": (chunk_retention, {}),
        "token": (chunk_simple_gla, {"g": x["token"]}),
        "channel": (chunk_gla, {"g": x["channel"]}),
    }[decay]
    if x["cu_seqlens"] is not None:
        # Some take any keyword.
        if "cu_seqlens" not in inspect.signature(call).parameters:
            raise TypeError(f"{call.__name__} has no argument cu_seqlens")
        given["cu_seqlens"] = x["cu_seqlens"]
    return call.__name__, lambda q, k, v: call(q, k, v, **given)[0]


def numbers(text):
    return [int(number) for number in text.split(",")]


def inputs(tokens, documents, heads, dim, dtype):
    shape = (1, tokens, heads, dim)
    make = lambda: torch.randn(shape, device="cuda", dtype=dtype)
    log_decay = lambda shape: torch.nn.functional.logsigmoid(torch.randn(shape, device="cuda")).div(16)
    return {
        "qkv": [make().requires_grad_(True) for _ in range(3)],
        "d_o": make(),
        "token": log_decay(shape[:3]),
        "channel": log_decay(shape).to(dtype),
        "cu_seqlens": torch.tensor(cu_seqlens(tokens, documents), device="cuda") if documents > 1 else None,
    }


def milliseconds(call, runs, clean):
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(runs + 3):
        for _ in range(OVERWRITTEN):
            cache.zero_()
        if clean:
            cache.view(torch.float32).sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(decay, tokens, options):
    x = inputs(tokens, options.documents, options.heads, options.dim, getattr(torch, options.dtype))
    name, attend = operator(decay, x)
    q, k, v = x["qkv"]

    def both():
        torch.autograd.grad(attend(q, k, v), (q, k, v), x["d_o"])

    with torch.no_grad():
        forward = milliseconds(lambda: attend(q, k, v), options.runs, options.clean)
    result = {"peer": name, "forward_ms": forward}
    if not options.forward_only:
        result["both_ms"] = milliseconds(both, options.runs, options.clean)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        result["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result


def compile_share(share, jobs, decays, tokens, options):
    """Calls everything once, with every `jobs`-th of the configurations that a kernel is tuned from."""
    all_of = Autotuner.prune_configs

    def some_of(self, kwargs):
        configs = all_of(self, kwargs)
        return configs[share::jobs] or configs[:1]

    Autotuner.prune_configs = some_of
    Autotuner.do_bench = lambda self, call, quantiles: [call() or 0.0] * len(quantiles)
    for decay in decays:
        try:
            x = inputs(tokens, options.documents, options.heads, options.dim, getattr(torch, options.dtype))
            q, k, v = x["qkv"]
            o = operator(decay, x)[1](q, k, v)
            if not options.forward_only:
                torch.autograd.grad(o, (q, k, v), x["d_o"])
        except Exception as error:  # The measurement will say so.
            print(f"share {share}, {decay}: {error}"[:300], file=sys.stderr)


def compile_ahead(jobs):
    shares = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "COMPILE_SHARE": str(share), "FLA_CACHE_RESULTS": "0"})
        for share in range(jobs)
    ]
    for share in shares:
        share.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=numbers, default="16384,131072")
    parser.add_argument("--decays", default="none,head,token,channel")
    parser.add_argument("--documents", type=int, default=1, help="64 tokens each, the rest as 1, 6, 2, 12, 3, 1, 6, ..")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--clean", action="store_true", help="read something into the L2 cache after overwriting it")
    parser.add_argument("--compile-jobs", type=int, default=1)
    options = parser.parse_args()
    decays = options.decays.split(",")
    if not {*decays} <= {"none", "head", "token", "channel"}:
        parser.error(f"--decays {options.decays}: expected some of none, head, token, channel")
    room = max(1, min(options.tokens) // AT_LEAST)
    if not 1 <= options.documents <= room:
        parser.error(f"--documents {options.documents}: expected 1 to {room}, of {AT_LEAST} tokens and more each (--tokens)")
    if "COMPILE_SHARE" in os.environ:
        share = int(os.environ["COMPILE_SHARE"])
        return compile_share(share, options.compile_jobs, decays, min(options.tokens), options)
    if options.compile_jobs > 1:
        compile_ahead(options.compile_jobs)
    versions = {"fla": fla.__version__, "torch": torch.__version__, "triton": triton.__version__}
    gpu = torch.cuda.get_device_name()
    for decay in decays:
        for tokens in options.tokens:
            try:
                result = measure(decay, tokens, options)
            except Exception as error:  # A kernel that does not compile here is a result too.
                result = {"error": f"{type(error).__name__}: {error}"[:300]}
            assert math.isfinite(result.get("forward_ms", 0.0))
            work = {"decay": decay, "tokens": tokens, "documents": options.documents}
            print(json.dumps({**work, **result, "gpu": gpu, **versions}), flush=True)


if __name__ == "__main__":
    main()
