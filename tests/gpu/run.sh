#!/usr/bin/env bash
# What needs a GPU: the collectives and the parity list over NCCL on 1, 2 and 4 processes, training losses against the CPU's, the
# CUDA kernels, small ones under compute-sanitizer too, `lasp attend` against PyTorch, and `lasp compare` in all modes on 1, 2 and 4
# processes.
#
#   tests/gpu/run.sh [nccl] [parity] [training] [kernels] [sanitizer] [attend] [compare]      all of them if none is named
#
# LASP_NCCL names another libnccl.so.2 than libtorch's own: several ranks on one GPU need 2.30 or later. LASP_PROGRAMS is a folder
# that holds the programs (lasp, nccl, parity_nccl, cuda, cuda_linear, cuda_packed, cuda_mma, fused), LASP_LOGS one for their output. LASP_LIMIT:
# seconds for each part. `attend` wants a python3 with torch and safetensors, `training` any.
set -uo pipefail
cd "$(dirname "$0")/../.."
PARTS=${*:-nccl parity training kernels sanitizer attend compare}
LOGS=${LASP_LOGS:-target/gpu}
LIMIT=${LASP_LIMIT:-900}
mkdir -p "$LOGS"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# For ranks that share a GPU.
export NCCL_MULTI_RANK_GPU_ENABLE=${NCCL_MULTI_RANK_GPU_ENABLE:-1} NCCL_MAX_CTAS=${NCCL_MAX_CTAS:-8}

if [ -z "${LASP_PROGRAMS:-}" ]; then
  LASP_PROGRAMS=$LOGS/programs
  mkdir -p "$LASP_PROGRAMS"
  cargo build --release --package lasp || exit 1
  ln -sf "$PWD/target/release/lasp" "$LASP_PROGRAMS/lasp"
  for at in collectives/nccl lasp-tests/parity_nccl kernels/cuda kernels/cuda_linear kernels/cuda_packed kernels/cuda_mma runtime/fused; do
    program=$(cargo test --release --no-run --package "${at%/*}" --test "${at#*/}" 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
    [ -n "$program" ] || { echo "cannot build $at"; exit 1; }
    ln -sf "$PWD/$program" "$LASP_PROGRAMS/${at#*/}"
  done
fi
P=$LASP_PROGRAMS

nccl() { "$P/nccl"; }
parity() { "$P/parity_nccl"; }

# LASP_JOBS programs at a time: each leaves the GPU idle while it compiles, and while libtorch computes on the CPU.
kernels() {
  go() { # program filters
    local name=$1${2:+-${*: -1}}
    OMP_NUM_THREADS=2 "$P/$1" "${@:2}" --nocapture --test-threads=1 > "$LOGS/$name.log" 2>&1
    local status=$?
    echo "$name: $(grep '^test result' "$LOGS/$name.log"), $([ $status = 0 ] || echo FAILED) rc $status"
    [ $status = 0 ] || grep -A 1 panicked "$LOGS/$name.log" | tail -n 20
    return $status
  }
  export -f go
  printf '%s\n' cuda_linear cuda_packed 'cuda_mma --exact as_good_as_naive_bf16' 'cuda_mma as_good_as_naive_f16' 'cuda_mma f32_to_1e_5' \
    'cuda_mma --skip as_good --skip f32_to' fused cuda | xargs -P "${LASP_JOBS:-3}" -I{} bash -c 'go {}'
}

# memcheck and racecheck of the tests' small cases, LASP_JOBS at a time, as most of it is the sanitizer's work on the CPU.
sanitizer() {
  command -v compute-sanitizer > /dev/null || { echo "not tested: no compute-sanitizer, a program of the CUDA toolkit"; return 0; }
  go() { # tool program filter
    local name=$1-$2${3:+-$3} status
    # The kernels of libtorch, of which the naive versions are made, and of cuBLAS are many, and not ours to check.
    local others=() of
    for of in native nvjet cutlass gemm; do others+=(--kernel-name-exclude "kernel_substring=$of"); done
    export LASP_SANITIZER=1 OMP_NUM_THREADS=1 PYTORCH_ALLOC_CONF=expandable_segments:False
    [ "$1" = racecheck ] || others+=(--report-api-errors no)
    # Each tensor by itself, so that memcheck sees where it ends; but not of tiles that TMA cuts off there, which it takes to be read as
    # a whole.
    [[ $1 = racecheck || $2 = cuda_linear || $2 = cuda_packed ]] || export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool "$1" "${others[@]}" --error-exitcode 1 "$P/$2" ${3:-} --test-threads=1 > "$LOGS/$name.log" 2>&1
    status=$?
    echo "$name: $(grep -E 'SUMMARY|^test result' "$LOGS/$name.log" | tail -n 2 | paste -s -d ' '), $([ $status = 0 ] || echo FAILED) rc $status"
    [ $status = 0 ] || grep -E -A 1 'panicked|Error:|Invalid' "$LOGS/$name.log" | tail -n 20
    return $status
  }
  export -f go
  for tool in racecheck memcheck; do
    for of in 'cuda_linear without_decay' 'cuda_linear per_head' 'cuda_linear per_token' 'cuda_linear layouts' 'cuda_linear looking' \
      cuda_packed cuda \
      'cuda_mma naive_bf16' 'cuda_mma naive_f16' 'cuda_mma f32_to' 'cuda_mma documents' 'cuda_mma layouts'; do
      echo "$tool $of"
    done
  done | xargs -P "${LASP_JOBS:-6}" -I{} bash -c 'go {}'
}

attend() { OMP_NUM_THREADS=1 LASP=$P/lasp python3 tests/pytorch/attend.py --device cuda --jobs "${LASP_JOBS:-6}"; }

# 20 steps of a small model, pure linear and hybrid: the losses of 1, 2 and 4 ranks with GPUs are those of one CPU.
training() {
  local runs=$LOGS/runs device=${LASP_DEVICE:-cuda} jobs counts=() found
  found=$("$P/lasp" doctor --json) || return 1
  rm -rf "$runs" && mkdir -p "$runs"
  # Always the same: how much steps amplify rounding depends on the data.
  python3 tests/gpu/corpus.py "$runs/texts" &&
    "$P/lasp" data prepare "$runs/texts" --out "$runs/corpus.bin" > "$runs/corpus.log" 2>&1 || { cat "$runs/corpus.log"; return 1; }
  go() { # pattern ranks device
    local name=$1-$2-$3
    # So small a model is slower with all cores, of which the other runs want some too.
    OMP_NUM_THREADS=2 mpirun --oversubscribe --bind-to none -n "$2" "$P/lasp" train tests/gpu/training.toml --run-dir "$runs/$name" \
      --set "data.path=$runs/corpus.bin" --set "model.pattern=$1" --set "parallel.sp=$2" --set "train.device=$3" \
      < /dev/null > "$runs/$name.log" 2>&1 || { echo "$name: rc $?"; tail -n 20 "$runs/$name.log"; }
  }
  for ranks in 1 2 4; do
    python3 tests/gpu/compare.py --allows "$ranks" "$device" <<< "$found" || continue
    jobs=() counts+=("$ranks")
    for pattern in L LLLN; do
      go $pattern $ranks "$device" & jobs+=($!)
      [ $ranks -gt 1 ] || [ "$device" = cpu ] || { go $pattern 1 cpu & jobs+=($!); }
    done
    wait "${jobs[@]}"
  done
  [ ${#counts[@]} = 0 ] || python3 tests/gpu/losses.py "$runs" "$device" "${counts[@]}"
}

# Every method in every mode, at lengths of which one is odd: a row has figures only where parity and bytes are right. Ranks that
# take turns on a GPU wait for each other's turns in every message: they have one length and one round.
compare() {
  local out=$LOGS/compare device=${LASP_DEVICE:-cuda} failed=0 found
  found=$("$P/lasp" doctor --json) || return 1
  rm -rf "$out" && mkdir -p "$out"
  go() { # ranks mode mixer
    local name=$1-$2-$3 start=() work=(--seq-lens 1021,4096 --rounds 5)
    python3 tests/gpu/compare.py --apart "$1" "$device" <<< "$found" || work=(--seq-lens 1021 --rounds 1)
    [ "$1" = 1 ] || start=(mpirun --oversubscribe --bind-to none -n "$1")
    LASP_LOG=debug "${start[@]}" "$P/lasp" compare --device "$device" --ranks "$1" --mode "$2" --mixer "$3" "${work[@]}" \
      --heads 4 --kv-heads 4 --dim 64 --out "$out/$name" < /dev/null > "$out/$name.log" 2>&1 &&
      python3 tests/gpu/compare.py "$out/$name/results.jsonl" "$device" "$1" || { echo "$name: FAILED"; tail -n 20 "$out/$name.log"; failed=1; }
  }
  for ranks in 1 2 4; do
    python3 tests/gpu/compare.py --allows "$ranks" "$device" <<< "$found" || continue
    for mode in operator train layer; do
      # Four ranks have more communicators to make, and nothing that two have not, but in the operators themselves.
      [ $ranks = 4 ] && [ $mode = layer ] && continue
      for mixer in linear softmax; do go $ranks $mode $mixer; done
    done
  done
  return $failed
}

failed=0
for part in $PARTS; do
  began=$SECONDS
  case $part in
    nccl | parity | training | kernels | sanitizer | attend | compare) ;;
    *) echo "no part $part"; exit 2 ;;
  esac
  export -f "$part"
  export P LOGS
  timeout "$LIMIT" bash -uo pipefail -c "$part" > "$LOGS/$part.log" 2>&1
  status=$?
  grep -E 'not tested|^test |test result|panicked|relative|cases|rows|differ|FAILED|rror' "$LOGS/$part.log" | tail -n "${LASP_LINES:-40}"
  echo "== $part: $([ $status = 0 ] && echo ok || echo "FAILED ($status)"), $((SECONDS - began)) s, $LOGS/$part.log"
  [ $status = 0 ] || failed=1
done
exit $failed
