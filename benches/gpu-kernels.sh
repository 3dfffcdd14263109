#!/usr/bin/env bash
# Linear-attention kernels of ours and of flash-linear-attention on one GPU, in one run: benches/gpu-kernels.sh FOLDER [OPTIONS]
# OPTIONS are for both: --documents 16, --tokens, --decays, --heads, --dim, --runs, --clean. DECAYS: the peer's alone; JOBS: how many
# processes compile its kernels.
# Needs PyTorch, Triton and flash-linear-attention in python3, which tunes for minutes. Leaves both results in FOLDER.
set -euo pipefail
out=${1:?a folder for the results}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$out/machine.txt"
"${LASP_GPU:-target/release/gpu}" "${@:2}" | tee "$out/ours.jsonl"
python3 "$(dirname "$0")/peers/linear_attention.py" --decays "${DECAYS:-none,head,token}" --compile-jobs "${JOBS:-8}" "${@:2}" | tee "$out/peer.jsonl"
python3 - "$out" <<'END'
import json, sys
rows = lambda name: [json.loads(line) for line in open(f"{sys.argv[1]}/{name}.jsonl")]
peers = {(row["decay"], row["tokens"]): row for row in rows("peer")}
print("decay    tokens documents | forward ms  of floor   peer  ratio | with backward  of floor   peer  ratio | extra MiB   peer")
for ours in rows("ours"):
    peer = peers.get((ours["decay"], ours["tokens"]), {})
    cell = lambda key, form: format(peer[key], form) if key in peer else "refused"
    ratio = lambda key: f'{peer[key] / ours[key]:.2f}' if key in peer else "-"
    print(
        f'{ours["decay"]:8} {ours["tokens"]:6} {ours["documents"]:9} | {ours["forward_ms"]:10.3f} {ours["forward_of_floor"]:8.0%} '
        f'{cell("forward_ms", ".3f"):>7} {ratio("forward_ms"):>6} | {ours["both_ms"]:13.3f} {ours["both_of_floor"]:8.0%} '
        f'{cell("both_ms", ".3f"):>7} {ratio("both_ms"):>6} | {ours["extra_mib"]:9.0f} {cell("extra_mib", ".0f"):>6}'
    )
END
