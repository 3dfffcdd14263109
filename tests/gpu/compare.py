"""Whether the rows of `lasp compare` are as they must be. With --allows whether so many ranks can have GPUs here, with --apart whether
each has its own; both by what `lasp doctor --json` says on standard input."""

import json
import sys


def allows(ranks: int, device: str) -> bool:
    found = json.load(sys.stdin)
    gpus = found["gpus"]["detail"]["count"]
    version = found["nccl"]["detail"]["version"]
    shares = version is not None and tuple(int(part) for part in version.split(".")[:2]) >= (2, 30)
    if device == "cpu" or ranks <= gpus or (gpus > 0 and shares):
        return True
    if gpus == 0:
        print("not tested: no CUDA device")
    else:
        print(f"not tested on {ranks} ranks: {gpus} GPUs, and NCCL {version}, where sharing one needs 2.30")
    return False


def check(path: str, device: str, ranks: int) -> None:
    rows = [json.loads(line) for line in open(path)]
    assert rows, "no rows"
    for row in rows:
        name = f"{row['method']}, {row['tokens']} tokens"
        assert (row["device"], row["ranks"]) == (device, ranks), f"{name}: {row['device']}, {row['ranks']} ranks"
        if row["skipped"]:
            print(f"{name}: {row['skipped']}")
            continue
        assert row["step"]["median_ms"] > 0 and row["memory"]["peak"] > 0, name
        assert 0 <= row["exposed"] <= 1, f"{name}: exposed {row['exposed']}"
        assert (sum(row["layers_received"]) > 0) == (ranks > 1), f"{name}: received {row['layers_received']}"
        for counted, formula in zip(row["layers_received"], row["formula_received"], strict=True):
            assert counted == formula if row["formula"] == "exact" else counted <= formula, name
        if device == "cuda":
            assert row["backend"] == "nccl" or ranks == 1, f"{name}: {row['backend']}"
            assert row["machine"]["gpu"] and row["versions"]["driver"], f"{name}: which GPU?"
            assert row["options"]["dtype"] == "bf16", name
    modes = f"{rows[0]['mode']}, {rows[0]['mixer']}, {ranks} ranks on {device}"
    print(f"{modes}: {len(rows)} rows, {', '.join(dict.fromkeys(row['method'] for row in rows))}")


def apart(ranks: int, device: str) -> bool:
    return device == "cpu" or ranks <= json.load(sys.stdin)["gpus"]["detail"]["count"]


if sys.argv[1] in ("--allows", "--apart"):
    asked = {"--allows": allows, "--apart": apart}[sys.argv[1]]
    sys.exit(not asked(int(sys.argv[2]), sys.argv[3]))
check(sys.argv[1], sys.argv[2], int(sys.argv[3]))
