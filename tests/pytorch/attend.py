"""Holds `lasp attend` against PyTorch in float64, as a user would bring tensors to it.

Needs a Python with torch and safetensors; the program is target/release/lasp or $LASP. With --device cuda it is the check of
the GPU path. Prints the relative RMS error of every output and exits with 1 if one is too large.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

LASP = os.environ.get("LASP", str(pathlib.Path(__file__).parents[2] / "target/release/lasp"))
TOLERANCE = {"f64": 1e-10, "f32": 1e-5, "bf16": 1e-2}
KIND = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}


def linear(q, k, v, log_decay, initial, bounds):
    """The recurrence, token by token; autograd gives its gradients."""
    outputs, finals = [], []
    for n, (start, end) in enumerate(bounds):
        state = initial[n : n + 1] if len(bounds) > 1 else initial
        for t in range(start, end):
            if log_decay is not None:
                a = log_decay if log_decay.dim() == 1 else log_decay[:, t]  # [H], [B, H] or [B, H, K]
                a = a.reshape(*((1,) if log_decay.dim() == 1 else ()), *a.shape, *(() if log_decay.dim() == 4 else (1,)), 1)
                state = state * a.exp()
            state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append((q[:, t, :, None, :] @ state)[:, :, 0])
        finals.append(state)
    return torch.stack(outputs, 1), torch.cat(finals)


def softmax(q, k, v, bounds):
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    parts = []
    for start, end in bounds:
        x = [y[:, start:end].transpose(1, 2) for y in (q, k, v)]
        parts.append(torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True).transpose(1, 2))
    return torch.cat(parts, 1)


def error(ours, truth):
    ours, truth = ours.double(), truth.double()
    return ((ours - truth).pow(2).mean() / truth.pow(2).mean().clamp_min(1e-30)).sqrt().item()


def check(options, mixer, dtype, decay, packed, ranks, layout):
    numbers = torch.Generator().manual_seed(0)
    b, t, h, hkv, dk, dv = (1 if packed else 2), 203, 4, (4 if mixer == "linear" else 2), 32, 48
    bounds = [(0, 50), (50, 51), (51, 203)] if packed else [(0, t)]
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=numbers).to(KIND[dtype])
    tensors = {"q": make(b, t, h, dk), "k": make(b, t, hkv, dk), "v": make(b, t, hkv, dv), "do": make(b, t, h, dv)}
    if packed:
        tensors["cu_seqlens"] = torch.tensor([0, 50, 51, 203])
    if mixer == "linear":
        tensors["initial_state"] = make(len(bounds) if packed else b, h, dk, dv)
        shape = {"none": None, "head": (h,), "token": (b, t, h), "channel": (b, t, h, dk)}[decay]
        if shape:
            tensors["log_decay"] = (-torch.rand(shape, dtype=torch.float64, generator=numbers) * 0.3).to(KIND[dtype])
    names = [n for n in ("q", "k", "v", "log_decay", "initial_state") if n in tensors]
    leaf = {n: tensors[n].double().requires_grad_() for n in names}
    if mixer == "linear":
        o, final = linear(leaf["q"], leaf["k"], leaf["v"], leaf.get("log_decay"), leaf["initial_state"], bounds)
    else:
        o, final = softmax(leaf["q"], leaf["k"], leaf["v"], bounds), None
    o.backward(tensors["do"].double())
    truth = {"o": o.detach(), **{"d" + n: leaf[n].grad for n in names}}
    if final is not None:
        truth["final_state"] = final.detach()

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/in.safetensors", f"{folder}/out.safetensors"
        save_file({n: x.contiguous() for n, x in tensors.items()}, source)
        command = [LASP, "attend", "--input", source, "--output", target, "--mixer", mixer, "--dtype", dtype]
        command += ["--ranks", str(ranks), "--layout", layout, "--device", options.device]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ours = load_file(target)
    errors = {n: error(ours[n], x) for n, x in truth.items()}
    name = f"{mixer} {decay:8} {dtype:4} packed {packed!s:5} ranks {ranks} {layout}"
    bad = [n for n, e in errors.items() if not e <= TOLERANCE[dtype]]
    print(name, " ".join(f"{n} {e:.1e}" for n, e in errors.items()), "WRONG: " + ", ".join(bad) if bad else "ok", flush=True)
    return not bad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="programs at once")
    options = parser.parse_args()
    cases = []
    for dtype in TOLERANCE:
        for ranks, layout in [(1, "contiguous"), (3, "zigzag")]:
            for packed in [False, True]:
                for decay in ["none", "head", "token", "channel"]:
                    cases.append(("linear", dtype, decay, packed, ranks, layout))
                cases.append(("softmax", dtype, "", packed, ranks, layout))
    if options.jobs > 1:
        torch.set_num_threads(1)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        ok = all(list(pool.map(lambda case: check(options, *case), cases)))
    print("all within tolerance" if ok else "some outputs are wrong")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
