"""Where a training step's time goes on a GPU: sums the trace of `lasp train --trace` by kernel.

    python3 benches/trace.py runs/NAME/trace-0.json [LINES]

Prints launches, busy time (of all streams together) and the span of a step, then the kernels by their share, in milliseconds a
step. A trace has two steps.
"""

import collections
import json
import sys

STEPS = 2
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def main(path, lines=40):
    events = [e for e in json.load(open(path))["traceEvents"] if e.get("ph") == "X"]
    work = [e for e in events if e.get("cat") in ON_GPU]
    if not work:
        sys.exit(f"{path}: nothing on a GPU")
    span = max(e["ts"] + e["dur"] for e in work) - min(e["ts"] for e in work)
    busy = sum(e["dur"] for e in work)
    ms = lambda us: us / STEPS / 1e3
    print(f"{len(work) // STEPS} launches a step, busy {ms(busy):.1f} ms, span {ms(span):.1f} ms")
    by_name = collections.defaultdict(lambda: [0, 0.0])
    for event in work:
        entry = by_name[event["name"].removeprefix("void ")]
        entry[0] += 1
        entry[1] += event["dur"]
    for name, (count, time) in sorted(by_name.items(), key=lambda item: -item[1][1])[:lines]:
        print(f"{ms(time):9.2f} ms {count / STEPS:7.1f} x  {name[:110]}")
    waits = collections.Counter(e["name"] for e in events if "Synchronize" in e["name"])
    print("waits of the host a step:", {name: count / STEPS for name, count in waits.items()})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
