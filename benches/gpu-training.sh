#!/usr/bin/env bash
# Training steps of the 1 B model on one GPU, from a cold cache of kernels: benches/gpu-training.sh FOLDER [TOKENS ..]
# Leaves in FOLDER what the program printed, metrics, and where the time of a step went (benches/trace.py).
set -euo pipefail
out=${1:?a folder for the results}
shift
mkdir -p "$out"
LASP_KERNELS=$(mktemp -d)
export LASP_KERNELS
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$out/machine.txt"
for tokens in "${@:-32768}"; do
  run=$(mktemp -d)/run
  "${LASP:-target/release/lasp}" train configs/linear-llama3-1b.toml --run-dir "$run" --trace \
    --set train.seq_len="$tokens" --set train.device=cuda --set checkpoint.keep=0 | tee "$out/$tokens.txt"
  cp "$run/metrics.jsonl" "$out/$tokens.jsonl"
  python3 benches/trace.py "$run/trace-0.json" | tee "$out/$tokens-kernels.txt"
done
