"""A whole training step of flash-linear-attention's linear-attention model on one NVIDIA GPU: JSON lines.

    python3 benches/peers/training.py --tokens 32768

The model of configs/linear-llama3-1b.toml: width 2048, 16 layers, 16 heads of 128, MLP 8192, vocabulary 128256 tied, no
decay; batch 1 of random tokens, AdamW, no activation checkpointing. Parameters are bf16 as the model's users load them
(`--parameters float32`: f32 under autocast). Needs PyTorch, Triton, transformers and flash-linear-attention.
"""

import argparse
import json
import statistics
import time

START = time.perf_counter()

import fla
import torch
import triton
from fla.models import LinearAttentionConfig, LinearAttentionForCausalLM

# Dense bf16 peak of H100 and H200 SXM.
PEAK_FLOPS = 989e12


def model(parameters, loss):
    config = LinearAttentionConfig(
        hidden_size=2048, num_hidden_layers=16, num_heads=16, intermediate_size=8192, vocab_size=128256,
        attn_mode="chunk", feature_map="identity", tie_word_embeddings=True, fuse_cross_entropy=loss == "fused",
        fuse_linear_cross_entropy=loss == "linear", use_cache=False,
    )
    torch.set_default_dtype(getattr(torch, parameters))
    with torch.device("cuda"):
        model = LinearAttentionForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.to(getattr(torch, parameters)).train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--parameters", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--loss", choices=["fused", "linear"], default="fused",
                        help="cross-entropy of all logits, which is FLA's default; or with the projection, in chunks")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = model(options.parameters, options.loss)
    count = sum(p.numel() for p in network.parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    times, first = [], None
    for _ in range(options.steps):
        tokens = torch.randint(128256, (1, options.tokens), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=options.parameters == "float32"):
            loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        first = first or time.perf_counter() - START
    # The first steps tune kernels.
    step = statistics.median(times[3:])
    rate = options.tokens / step
    print(json.dumps({
        "peer": "fla LinearAttentionForCausalLM", "parameters": count, "parameter_dtype": options.parameters,
        "loss_by": options.loss, "tokens": options.tokens, "step_ms": 1e3 * step, "tokens_per_s": rate, "mfu": 6 * count * rate / PEAK_FLOPS,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "first_step_s": first, "loss": loss.item(),
        "gpu": torch.cuda.get_device_name(), "fla": fla.__version__, "torch": torch.__version__, "triton": triton.__version__,
    }))


if __name__ == "__main__":
    main()
