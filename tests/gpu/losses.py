"""Holds the losses of runs on one device, on the numbers of ranks that are named, against those of the same model on one CPU."""

import json
import pathlib
import sys

RUNS, DEVICE, RANKS = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
STEPS, TOLERANCE = 20, 1e-3

wrong = not RANKS
for pattern in ("L", "LLLN"):
    for ranks in RANKS:
        name = f"{pattern}, {ranks} ranks on {DEVICE}"
        try:
            theirs, ours = (
                [json.loads(line)["loss"] for line in (RUNS / run / "metrics.jsonl").open()]
                for run in (f"{pattern}-1-cpu", f"{pattern}-{ranks}-{DEVICE}")
            )
        except OSError as error:
            print(f"{name}: FAILED, {error}")
            wrong = True
            continue
        differences = [abs(a - b) / b for a, b in zip(ours, theirs)]
        learns = theirs[-1] < theirs[0] - 0.5
        ok = len(ours) == len(theirs) == STEPS and learns and all(d <= TOLERANCE for d in differences)
        at = max(range(len(differences)), key=differences.__getitem__, default=0)
        print(
            f"{name}: {'ok' if ok else 'FAILED'}, {len(ours)} steps, losses {ours[0]:.4f} to {ours[-1]:.4f}; they differ by at "
            f"most {max(differences, default=0):.1e}, at step {at + 1}"
        )
        wrong |= not ok
sys.exit(wrong)
