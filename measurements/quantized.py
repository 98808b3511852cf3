"""Time and memory of bundles against transformers in bfloat16 and float32, on a CPU.

    python measurements/quantized.py --work /tmp/visprune-bench BUNDLE...

The bundles are exports of the checkpoint that `model.py` makes. The prompt is one image and 64 text tokens,
on two threads. transformers (sdpa) sees all 576 visual tokens; a bundle keeps the number that it was exported
for. transformers reads a checkpoint of the dtype that it runs, because converting one would set its peak
memory. Each contestant is a subprocess with memory of its own. A round is one repetition of each in turn
while the others wait, so that other load on the machine affects all alike.

The stage "prune" is the selection of tokens and the projector; transformers has only the projector. Figures
are medians over rounds, with the interquartile range as a share of the median. Ratios are medians over rounds
of the ratio in a round.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from measure import processor, ratio
from rounds import WARM_UP, Contestant, ContestantError, times

DTYPES = ("bfloat16", "float32")


def checkpoint(work: Path, dtype: str) -> Path:
    """Make the checkpoint if it does not exist, and return its path."""
    path = work / ("checkpoint" if dtype == "float32" else f"checkpoint-{dtype}")
    if not (path / "config.json").is_file():
        from model import make  # here, because it imports PyTorch, which nothing else needs

        make(path, dtype)
    return path


def names(bundles: list[Path]) -> list[str]:
    """Return names for bundles: those of their folders, or whole paths if two folders have the same name."""
    short = [path.resolve().name for path in bundles]
    return short if len({*short, *DTYPES}) == len(short) + len(DTYPES) else list(map(str, bundles))


def started(stack: ExitStack, args: argparse.Namespace) -> list[Contestant]:
    """Start all contestants one after another."""
    entries = [
        (f"transformers {dtype}", ["transformers", str(checkpoint(args.work, dtype)), "--dtype", dtype])
        for dtype in DTYPES
    ]
    entries += zip(names(args.bundles), (["bundle", str(path)] for path in args.bundles), strict=True)
    contestants = []
    for index, (name, arguments) in enumerate(entries):
        threads = ["--threads", str(args.threads)]
        contestant = Contestant(name, [*arguments, *threads], args.work / f"stderr-{index}.txt")
        stack.callback(contestant.close)
        contestants.append(contestant)
        print(f"{name} loaded", file=sys.stderr, flush=True)
    return contestants


def ratios(mine: Contestant, theirs: dict[str, Contestant]) -> dict[str, float]:
    """Return the ratios that the goals are stated in: time as a speed-up, memory as a share."""
    found = {}
    for metric in ("first token", "decode"):
        best = min(theirs, key=lambda dtype: theirs[dtype].summaries[metric].median)
        for dtype, name in ((best, f"transformers' best, {best}"), ("float32", "float32")):
            found[f"{metric}, {name} / ours"] = ratio(theirs[dtype].ms[metric], mine.ms[metric])
    for dtype, other in theirs.items():
        found[f"memory after generation, ours / {dtype}"] = mine.memory.resident / other.memory.resident
        found[f"peak memory, ours / {dtype}"] = mine.memory.peak / other.memory.peak
    return found


def show(contestants: list[Contestant], found: dict[str, dict[str, float]]) -> None:
    """Print the tables."""
    times(contestants)
    width = max(len(contestant.name) for contestant in contestants)
    print(f"\n{'MB (own + mapped)':{width}s}{'after load':>24s}{'after generation':>24s}{'peak':>8s}")
    for contestant in contestants:
        cells = [
            f"{memory.resident:.0f} ({memory.anonymous:.0f} + {memory.mapped:.0f})"
            for memory in (contestant.loaded, contestant.memory)
        ]
        peak = f"{contestant.memory.peak:.0f}"
        print(f"{contestant.name:{width}s}" + "".join(f"{cell:>24s}" for cell in cells) + f"{peak:>8s}")
    for name, values in found.items():
        print(f"\n{name}")
        for what, value in values.items():
            print(f"  {what:50s} {value:.3f}")


def main() -> None:
    """Measure; print tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: one round has no spread")
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            contestants = started(stack, args)
            for number in range(WARM_UP + args.rounds):
                for contestant in contestants:
                    contestant.repeat(counts=number >= WARM_UP)
                print(f"round {number + 1} of {WARM_UP + args.rounds}", file=sys.stderr, flush=True)
    except ContestantError as error:
        sys.exit(str(error))
    theirs = dict(zip(DTYPES, contestants, strict=False))
    found = {mine.name: ratios(mine, theirs) for mine in contestants[len(DTYPES) :]}
    print(processor())
    show(contestants, found)
    figures = {
        contestant.name: {
            "ms": {metric: asdict(summary) for metric, summary in contestant.summaries.items()},
            "rounds": contestant.ms,
            "after load": asdict(contestant.loaded),
            "after generation": asdict(contestant.memory),
        }
        for contestant in contestants
    }
    summary = {"processor": processor(), "threads": args.threads, "rounds": args.rounds}
    print("\n" + json.dumps(summary | {"figures": figures, "ratios": found}))


if __name__ == "__main__":
    main()
