"""Start of `visprune run`: time from the command to the first token, and memory, of one or two checkouts.

    python measurements/start.py BUNDLE
    python measurements/start.py BUNDLE --against OTHER-CHECKOUT

Each start is a process of its own that answers with one token, whose end of line is the first thing that it
writes. In a round each checkout starts once, in turns of order, so that other load on the machine affects all
alike. The first round warms the disk cache and compiles the modules; it does not count. Figures are medians
over rounds, with the interquartile range as a share of the median; ratios are medians over rounds of
this / other in a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import Memory, Summary, processor, ratio

HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Start:
    """One start.

    Attributes:
        ms: Milliseconds from the command to the first token.
        memory: Memory when the first token was there.
    """

    ms: float
    memory: Memory


def start(checkout: Path, arguments: list[str]) -> Start:
    """Run the command of a checkout until its first token.

    Raises:
        RuntimeError: It ended without one.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules of an installed package are compiled too
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "visprune", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    said = os.read(process.stdout.fileno(), 1)
    ms = (time.perf_counter() - begun) * 1e3
    if not said:
        raise RuntimeError(process.communicate()[1].decode())
    memory = Memory.of(str(process.pid))  # it frees its graphs now, which takes longer than this
    process.communicate()
    return Start(ms, memory)


def main() -> None:
    """Measure; print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", type=Path, help="another checkout of visprune, with its own src/")
    parser.add_argument("--image", type=Path, default=HERE / "demo" / "scene.png")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: one round has no spread")
    checkouts = [HERE, *([args.against.resolve()] if args.against else [])]
    prompt = "What is in the picture?"
    arguments = [str(args.bundle), "--image", str(args.image), "--prompt", prompt, "--max-new-tokens", "1"]
    starts: list[list[Start]] = [[] for _ in checkouts]
    for number in range(1 + args.rounds):
        turns = list(zip(checkouts, starts, strict=True))
        for checkout, found in turns if number % 2 else reversed(turns):
            one = start(checkout, arguments)
            if number:
                found.append(one)
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    figures = {
        "ms": [[one.ms for one in found] for found in starts],
        "MB": [[one.memory.resident for one in found] for found in starts],
        "MB, own": [[one.memory.anonymous for one in found] for found in starts],
        "MB, peak": [[one.memory.peak for one in found] for found in starts],
    }
    print(processor())
    print(f"{'':50s}" + "".join(f"{what:>18s}" for what in figures))
    for index, checkout in enumerate(checkouts):
        cells = [Summary.of(values[index]) for values in figures.values()]
        shown = "".join(f"{cell.median:12.0f} ({100 * cell.spread:2.0f}%)" for cell in cells)
        print(f"{checkout!s:50s}{shown}")
    if args.against:
        ratios = {what: ratio(*values) for what, values in figures.items()}
        print(f"{'this / other':50s}" + "".join(f"{value:18.3f}" for value in ratios.values()))
    print(json.dumps([[asdict(one) for one in found] for found in starts]))


if __name__ == "__main__":
    main()
