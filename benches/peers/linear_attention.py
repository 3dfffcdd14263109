"""flash-linear-attention's causal linear attention on one NVIDIA GPU: a JSON line for each decay and length.

    python3 benches/peers/linear_attention.py --tokens 16384,131072 --decays none,head

Times are medians of CUDA events around one call, the L2 cache overwritten before each, for so long that the GPU does not wait
for launches; as in `target/release/gpu`. Memory is the peak of the allocator above what was allocated before a forward and
backward pass. Needs PyTorch, Triton and flash-linear-attention. A decay that this version refuses, or takes of no packed
documents, is a line with an error.
"""

import argparse
import inspect
import itertools
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


def milliseconds(call, runs):
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(runs + 3):
        for _ in range(OVERWRITTEN):
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
    x = inputs(tokens, options.documents, options.heads, options.dim, getattr(torch, options.dtype))
    name, attend = operator(decay, x)
    q, k, v = x["qkv"]

    def both():
        torch.autograd.grad(attend(q, k, v), (q, k, v), x["d_o"])

    with torch.no_grad():
        forward = milliseconds(lambda: attend(q, k, v), options.runs)
    result = {"peer": name, "forward_ms": forward}
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
    parser.add_argument("--tokens", type=numbers, default="16384,131072")
    parser.add_argument("--decays", default="none,head,token,channel")
    parser.add_argument("--documents", type=int, default=1, help="64 tokens each, the rest as 1, 6, 2, 12, 3, 1, 6, ..")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--forward-only", action="store_true")
    options = parser.parse_args()
    decays = options.decays.split(",")
    if not {*decays} <= {"none", "head", "token", "channel"}:
        parser.error(f"--decays {options.decays}: expected some of none, head, token, channel")
    room = max(1, min(options.tokens) // AT_LEAST)
    if not 1 <= options.documents <= room:
        parser.error(f"--documents {options.documents}: expected 1 to {room}, of {AT_LEAST} tokens and more each (--tokens)")
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
