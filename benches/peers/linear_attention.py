"""flash-linear-attention's causal linear attention on one NVIDIA GPU: a JSON line for each decay and length.

    python3 benches/peers/linear_attention.py --tokens 16384,131072 --decays none,head

Times are medians of CUDA events around one call, the L2 cache overwritten before each, as in `target/release/gpu`; memory is
the peak of the allocator above what was allocated before a forward and backward pass. Needs PyTorch, Triton and
flash-linear-attention. A decay that this version refuses is a line with an error.
"""

import argparse
import json
import math
import statistics

import fla
import torch
import triton
from fla.ops.gla import chunk_gla
from fla.ops.linear_attn import chunk_linear_attn
from fla.ops.retention import chunk_retention
from fla.ops.simple_gla import chunk_simple_gla


def operator(decay, x):
    """A function of q, k, v, for inputs as `inputs` makes them."""
    if decay == "none":
        return "chunk_linear_attn", lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0]
    if decay == "head":
        return "chunk_retention", lambda q, k, v: chunk_retention(q, k, v)[0]
    if decay == "token":
        return "chunk_simple_gla", lambda q, k, v: chunk_simple_gla(q, k, v, g=x["token"])[0]
    return "chunk_gla", lambda q, k, v: chunk_gla(q, k, v, g=x["channel"])[0]


def inputs(tokens, heads, dim, dtype):
    shape = (1, tokens, heads, dim)
    make = lambda: torch.randn(shape, device="cuda", dtype=dtype)
    log_decay = lambda shape: torch.nn.functional.logsigmoid(torch.randn(shape, device="cuda")).div(16)
    return {
        "qkv": [make().requires_grad_(True) for _ in range(3)],
        "d_o": make(),
        "token": log_decay(shape[:3]),
        "channel": log_decay(shape).to(dtype),
    }


def milliseconds(call, runs):
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(runs + 3):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(decay, tokens, options):
    x = inputs(tokens, options.heads, options.dim, getattr(torch, options.dtype))
    name, attend = operator(decay, x)
    q, k, v = x["qkv"]

    def both():
        torch.autograd.grad(attend(q, k, v), (q, k, v), x["d_o"])

    with torch.no_grad():
        forward = milliseconds(lambda: attend(q, k, v), options.runs)
    result = {"peer": name, "decay": decay, "tokens": tokens, "forward_ms": forward}
    if not options.forward_only:
        result["both_ms"] = milliseconds(both, options.runs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        result["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16384,131072")
    parser.add_argument("--decays", default="none,head,token,channel")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--forward-only", action="store_true")
    options = parser.parse_args()
    versions = {"fla": fla.__version__, "torch": torch.__version__, "triton": triton.__version__}
    gpu = torch.cuda.get_device_name()
    for decay in options.decays.split(","):
        for tokens in map(int, options.tokens.split(",")):
            try:
                result = measure(decay, tokens, options)
            except Exception as error:  # A kernel that does not compile here is a result too.
                result = {"decay": decay, "tokens": tokens, "error": f"{type(error).__name__}: {error}"[:300]}
            assert math.isfinite(result.get("forward_ms", 0.0))
            print(json.dumps({**result, "gpu": gpu, **versions}), flush=True)


if __name__ == "__main__":
    main()
