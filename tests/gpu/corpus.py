"""Documents of a made-up language, the same each time: python3 tests/gpu/corpus.py FOLDER"""

import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
state = 1


def one_of(choices):
    global state
    state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
    return choices[(state >> 33) % len(choices)]


NAMES, OPERATORS = ["alpha", "beta", "count", "delta", "edge", "flow", "grid", "head"], ["+", "-", "*", "//"]
for document in range(400):
    lines = []
    for function in range(one_of(range(1, 12))):
        lines.append(f"def {one_of(NAMES)}_{function}({one_of(NAMES)}):")
        for _ in range(one_of(range(1, 9))):
            lines.append(f"    {one_of(NAMES)} = {one_of(NAMES)} {one_of(OPERATORS)} {one_of(range(1000))}")
        lines.append(f"    return {one_of(NAMES)}\n")
    (folder / f"{document:03}.txt").write_text("\n".join(lines))
