#!/usr/bin/env bash
# Methods of sequence parallelism beside each other on this machine's GPUs: benches/gpu-compare.sh [FOLDER]
# One rank, and then 2, 4 and 8 where there are as many GPUs, each the operator, a layer and training steps of configs/linear-llama3-1b.toml
# and its hybrid. Leaves in FOLDER what was printed, results.jsonl and report.html of each; FOLDER is benches/runs/DATE-GPU if not given.
# ONLY='operator|layer': those whose name matches. RANKS=2: of these alone. One that fails does not keep the others from running; the last line names all that did.
set -euo pipefail
cd "$(dirname "$0")/.."
lasp=${LASP:-target/release/lasp}
gpus=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)
name=$(head -n 1 <<<"$gpus" | sed 's/,.*//; s/^NVIDIA //; s/ .*//' | tr '[:upper:]' '[:lower:]')
out=${1:-benches/runs/$(date +%F)-$name}
mkdir -p "$out"
echo "$gpus" >"$out/machine.txt"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

failed=()
go() { # name ranks arguments
  [[ $1 =~ ${ONLY:-.} ]] || return 0
  local to=$out/compare-$1-$2 start=()
  [ "$2" = 1 ] || start=(mpirun --bind-to none -n "$2")
  mkdir -p "$to"
  "${start[@]}" "$lasp" compare configs/linear-llama3-1b.toml --device cuda --rounds "${ROUNDS:-20}" --out "$to" "${@:3}" |
    tee "$to/console.txt" || failed+=("$1 on $2")
}

for ranks in ${RANKS:-1 2 4 8}; do
  [ "$ranks" -le "$(wc -l <<<"$gpus")" ] || break
  for decay in none head token; do
    go "linear-operator-$decay" $ranks --decay $decay --methods lasp2,lasp1,all_scan,hierarchical --seq-lens "${LONG:-16K,64K,128K}"
  done
  go linear-operator-quadratic $ranks --methods lasp2,ring_left_product,megatron_sp_left_product --seq-lens "${SHORT:-4K,16K}"
  go softmax-operator $ranks --mixer softmax --seq-lens "${SHORT:-4K,16K},64K"
  go linear-layer $ranks --mode layer --methods lasp2,lasp1,all_scan,hierarchical --seq-lens "${LONG:-16K,64K,128K}"
  go softmax-layer $ranks --mode layer --mixer softmax --seq-lens "${SHORT:-4K,16K},64K"
  go linear-train $ranks --mode train --methods lasp2,lasp1,all_scan,hierarchical --seq-lens 16K,32K
  go softmax-train $ranks --mode train --mixer softmax --set model.pattern=LLLN --seq-lens 16K,32K
done
[ ${#failed[@]} = 0 ] || {
  printf -v names ', %s' "${failed[@]}"
  echo "failed: ${names:2}" >&2
  exit 1
}
