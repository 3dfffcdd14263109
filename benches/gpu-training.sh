#!/usr/bin/env bash
# Training steps of the 1 B model, from a cold cache of kernels: benches/gpu-training.sh FOLDER [TOKENS ..]
# Leaves in FOLDER what the program printed, metrics, and where the time of a step went (benches/trace.py). RANKS=2 shares the
# sequence over two GPUs. PEER=1 also measures flash-linear-attention's model, which needs PyTorch, Triton, transformers and
# flash-linear-attention in python3 and tunes for minutes.
set -euo pipefail
out=${1:?a folder for the results}
shift
mkdir -p "$out"
LASP_KERNELS=$(mktemp -d)
export LASP_KERNELS OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
ranks=${RANKS:-1} start=()
[ "$ranks" = 1 ] || start=(mpirun --bind-to none -n "$ranks")
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$out/machine.txt"
for tokens in "${@:-32768}"; do
  run=$(mktemp -d)/run
  "${start[@]}" "${LASP:-target/release/lasp}" train configs/linear-llama3-1b.toml --run-dir "$run" --trace --set train.seq_len="$tokens" \
    --set train.device=cuda --set parallel.sp="$ranks" --set checkpoint.keep=0 | tee "$out/$tokens.txt"
  cp "$run/metrics.jsonl" "$out/$tokens.jsonl"
  python3 benches/trace.py "$run/trace-0.json" | tee "$out/$tokens-kernels.txt"
  [ -z "${PEER:-}" ] || python3 benches/peers/training.py --tokens "$tokens" | tee -a "$out/peer.jsonl"
done
