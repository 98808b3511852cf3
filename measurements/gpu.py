"""LLaVA-1.5-7B's shapes on an NVIDIA GPU, against transformers, in one run.

    python measurements/gpu.py --work /tmp/visprune-bench
    python measurements/gpu.py --work /tmp/visprune-bench --layers 2 --device cpu     # a rehearsal

Random float16 weights (nothing is downloaded), batch 1, one image and 64 text tokens, 128 new tokens, greedy.
transformers with sdpa, and with its compiled static cache; a bundle in ONNX Runtime's CUDA provider, with all
visual tokens and with a quarter of them (fopru-rank); the same in TensorRT-RTX and in TensorRT, where an
installed package takes this GPU: engines are built first. Who cannot run says why, and the others go on.

Each contestant is a process of its own. Where memory suffices, all are loaded and a round is one repetition
of each in turn; else they come one after another. Figures are medians over rounds, with the interquartile
range as a share of the median. Device memory is what the whole GPU had in use beyond what it had before the
contestant was loaded, a CUDA context included: nothing else may use the GPU.

"All visual tokens" is the same bundle at ratio 1: FoPru's scores are computed, and not used. By arithmetic it
needs 100 GB of disk. Packages: torch and onnxruntime-gpu for CUDA, and tensorrt-rtx or tensorrt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import large
import numpy as np
from measure import polling, processor, ratio
from numpy.typing import NDArray
from rounds import WARM_UP, Contestant, ContestantError, times

import visprune
from visprune.errors import UnsupportedError
from visprune.targets import target as known_target
from visprune.targets import tensorrt

TOLERANCE = 0.02
"""Largest relative difference (L2) of the first token's logits between those that keep the same tokens."""

PRUNED = 0.25
ENGINES = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}  # target by provider
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt")
SDPA, COMPILED = "transformers", "transformers, compiled"


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU, as nvidia-smi tells of it; memory in MB."""

    name: str
    driver: str
    sm: int
    total: float

    @staticmethod
    def query(fields: str) -> list[str]:
        """What nvidia-smi says.

        Raises:
            OSError, subprocess.CalledProcessError: There is no GPU, or no driver.
        """
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
        return [
            word.strip()
            for word in subprocess.check_output(command, text=True, stderr=subprocess.STDOUT).split(",")
        ]

    @staticmethod
    def find() -> Gpu:
        """The first one."""
        name, driver, capability, total = Gpu.query("name,driver_version,compute_cap,memory.total")
        return Gpu(name, driver, int(capability.replace(".", "")), float(total) * 1.048576)

    @staticmethod
    def used() -> float:
        """Memory in use, by all processes."""
        return float(Gpu.query("memory.used")[0]) * 1.048576


@dataclass(slots=True)
class Entry:
    """Someone who takes part: how it is started, and what came of it.

    Attributes:
        arguments: Of `contestant.py`.
        pruned: Whether it keeps a quarter of the visual tokens.
        failure: Why it does not run, or not any more.
        memory: The most it took, in MB: of the GPU, or of the host in a rehearsal.
        logits: Of the first new token, [V].
        tokens: All new ones.
    """

    name: str
    arguments: list[str]
    pruned: bool = False
    failure: str = ""
    memory: float = 0.0
    logits: NDArray[np.float64] | None = None
    tokens: tuple[int, ...] = ()
    contestant: Contestant | None = None

    def start(self, errors: Path, gpu: Gpu | None) -> None:
        """Load it, and let it answer once, which is its warm-up too."""
        used = [Gpu.used() if gpu else 0.0]
        with polling(lambda: used.append(Gpu.used()), 0.05) if gpu else nullcontext():
            self.contestant = Contestant(self.name, self.arguments, errors)
            logits, tokens = self.contestant.answer()
        self.logits, self.tokens = np.array(logits), tuple(tokens)
        self.memory = max(used) - used[0] if gpu else self.contestant.memory.peak


def entries(args: argparse.Namespace, gpu: Gpu | None) -> Iterator[Entry]:
    """All of them; what they run is made if it is not there yet."""
    checkpoint = large.make(args.work / f"large-{args.layers}", args.layers)
    common = ["--steps", str(args.tokens - 1), "--threads", str(len(os.sched_getaffinity(0)))]
    # A CPU has few kernels for float16.
    dtype = ["--dtype", "float16" if gpu else "float32", "--device", args.device]
    theirs = ["transformers", str(checkpoint), *dtype, *common]
    yield Entry(SDPA, theirs)
    yield Entry(COMPILED, [*theirs, "--compiled"])
    for provider, target in {args.device: "onnxruntime", **(ENGINES if gpu else {})}.items():
        failure, path = "", args.work / f"gpu-{target}-{args.layers}"
        try:
            made(checkpoint, path, target, gpu)
        except visprune.VispruneError as error:
            failure = str(error)
        for kept in (1.0, PRUNED):
            arguments = ["bundle", str(path), "--provider", provider, "--ratio", str(kept), *common]
            yield Entry(f"visprune {provider}, {kept:g}", arguments, kept < 1.0, failure)


def made(checkpoint: Path, path: Path, target: str, gpu: Gpu | None) -> None:
    """Export for a target, and build its engines for this GPU, unless that was done.

    Raises:
        VispruneError: The target does not take this GPU, its package is missing, an engine cannot be built.
    """
    if path.is_dir():
        return
    known = known_target(target)
    if gpu is not None and known.sms and gpu.sm not in known.sms:
        takes = ", ".join(map(str, known.sms))
        raise UnsupportedError(f"{target} does not take SM{gpu.sm}.", f"It takes {takes}.")
    if known.builds_engines:
        tensorrt(target)
    print(f"making {path}", file=sys.stderr, flush=True)
    onnx = path if target == "onnxruntime" else path.with_name(f"{path.name}-onnx")
    options = {"method": "fopru-rank", "ratio": PRUNED, "dtype": "fp16", "target": target}
    visprune.export(checkpoint, output=onnx, force=True, verify=False, **options)
    if gpu is not None and onnx != path:
        try:
            visprune.build(onnx, path, target=target, sm=(gpu.sm,) if known.anywhere else None)
        finally:
            shutil.rmtree(onnx)


def fit_together(found: list[Entry], args: argparse.Namespace, gpu: Gpu | None) -> bool:
    """Whether all may be loaded at once: each takes its weights and some more, in float32 on a CPU."""
    weights = large.size_of(args.work / f"large-{args.layers}", "*.safetensors") / 1e6
    if gpu is not None:
        return len(found) * 1.4 * weights < gpu.total - Gpu.used()
    available = next(
        s for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemAvailable")
    )
    return len(found) * 2.8 * weights < int(available.split()[1]) / 1e3


def play(group: list[Entry], args: argparse.Namespace, gpu: Gpu | None) -> None:
    """Load all of a group, then let each repeat in turn; who fails is left out from there on."""
    with ExitStack() as stack:
        for entry in group:
            print(f"loading {entry.name}", file=sys.stderr, flush=True)
            errors = args.work / f"stderr-{entry.name.replace(' ', '-')}.txt"
            try:
                entry.start(errors, gpu)
                stack.callback(entry.contestant.close)
            except ContestantError as error:
                entry.failure = str(error)
        for number in range(WARM_UP + args.rounds - 1):
            for entry in group:
                try:
                    if not entry.failure:
                        entry.contestant.repeat(counts=number >= WARM_UP - 1)
                except ContestantError as error:
                    entry.failure = str(error)


def agreement(done: list[Entry]) -> Iterator[tuple[str, float, int]]:
    """Everyone beside the first who keeps the same tokens.

    Yields:
        Names, the relative difference of the logits, and how many new tokens are the same before one differs.
    """
    for pruned in (False, True):
        first, *others = [entry for entry in done if entry.pruned is pruned] or [None]
        for entry in others:
            error = np.linalg.norm(entry.logits - first.logits) / np.linalg.norm(first.logits)
            pairs = zip(entry.tokens, first.tokens, strict=True)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(first.tokens))
            yield f"{entry.name} / {first.name}", float(error), same


def goals(done: list[Entry]) -> Iterator[tuple[str, float, float]]:
    """What is compared, the speed-up, and the one that is wanted."""
    ran = {entry.name: entry.contestant for entry in done}
    theirs = [ran[name] for name in (SDPA, COMPILED) if name in ran]
    best = min(theirs, key=lambda other: other.middles["first token"].median, default=None)
    for mine in [entry.contestant for entry in done if entry.pruned]:
        for metric, other, wanted in (("first token", best, 2.0), ("decode", ran.get(COMPILED), 1.0)):
            if other is not None:
                what = f"{metric}, {other.name} / {mine.name}"
                yield what, ratio(other.ms[metric], mine.ms[metric]), wanted


def report(done: list[Entry], *, rehearsal: bool) -> None:
    """The tables."""
    times([entry.contestant for entry in done])
    print(f"\n{'':32s}{'tokens/s':>10s}{'peak ' + ('host' if rehearsal else 'GPU') + ' MB':>16s}")
    for entry in done:
        rate = 1e3 / entry.contestant.middles["decode"].median
        print(f"{entry.name:32s}{rate:10.1f}{entry.memory:16.0f}")
    print(
        f"\nlogits of the first token, relative difference (at most {TOLERANCE:g}); tokens before one differs"
    )
    for what, error, same in agreement(done):
        said = "ok" if error <= TOLERANCE else "NOT within tolerance"
        print(f"{what:64s}{error:10.5f}  {said};  {same} of {len(done[0].tokens)}")
    print("\nspeed-ups" + (", in a rehearsal: they say nothing of a GPU" if rehearsal else ", and the goals"))
    for what, value, wanted in goals(done):
        verdict = "" if rehearsal else f"   goal {wanted:g}: {'met' if value >= wanted else 'NOT met'}"
        print(f"{what:64s}{value:10.2f}{verdict}")


def main() -> None:
    """Make what is run, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if min(args.rounds, args.tokens) < 2:
        parser.error("--rounds and --tokens must be at least 2")
    os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0"}
    try:
        gpu = Gpu.find() if args.device == "cuda" else None
    except (OSError, subprocess.CalledProcessError):
        sys.exit("nvidia-smi finds no GPU here. --layers 2 --device cpu is a rehearsal.")
    args.work.mkdir(parents=True, exist_ok=True)
    found = list(entries(args, gpu))
    able = [entry for entry in found if not entry.failure]
    together = fit_together(able, args, gpu)
    for group in [able] if together else [[entry] for entry in able]:
        play(group, args, gpu)
    done = [entry for entry in able if not entry.failure]
    where = f"{gpu.name}, SM{gpu.sm}, driver {gpu.driver}" if gpu else f"REHEARSAL on a CPU: {processor()}"
    order = "in turn" if together else "one after another"
    versions = {p: metadata.version(p) for p in PACKAGES if any(metadata.distributions(name=p))}
    print(where)
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{args.layers} layers, {args.tokens} new tokens, {args.rounds} rounds, {order}\n")
    if done:
        report(done, rehearsal=gpu is None)
    for entry in found:
        if entry.failure:
            print(f"\n{entry.name} did not run: {entry.failure}")
    if args.json:
        summary = {
            "where": where,
            "versions": versions,
            "layers": args.layers,
            "tokens": args.tokens,
            "order": order,
        }
        figures = {entry.name: {"memory": entry.memory, "rounds": entry.contestant.ms} for entry in done}
        results = {"figures": figures, "failures": {e.name: e.failure for e in found if e.failure}}
        results |= {"agreement": list(agreement(done)), "speed-ups": list(goals(done))}
        args.json.write_text(json.dumps(summary | results, indent=1))
    sys.exit(any(error > TOLERANCE for _, error, _ in agreement(done)))


if __name__ == "__main__":
    main()
