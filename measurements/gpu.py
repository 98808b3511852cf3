"""Speed and memory of LLaVA-1.5-7B's shapes on an NVIDIA GPU, against transformers.

    python measurements/gpu.py --work /tmp/visprune-bench
    python measurements/gpu.py --work /tmp/visprune-bench --layers 2 --device cpu     # a rehearsal

Random float16 weights (nothing is downloaded), batch 1, one image and 64 text tokens, 128 new tokens, greedy.
Contestants are transformers with sdpa, and with its compiled static cache; a bundle in ONNX Runtime's CUDA
provider, with all visual tokens and with a quarter of them (fopru-rank); and the same in TensorRT-RTX and in
TensorRT, if an installed package takes this GPU. Their engines are built first. A contestant that cannot run
reports the reason, and the others go on.

Each contestant is a subprocess. If memory suffices, all are loaded, and a round is one repetition of each in
turn; else they run one after another. Figures are medians over rounds, with the interquartile range as a
share of the median. The device memory of a contestant is the memory in use on the whole GPU, its CUDA context
included, less the memory in use before it was loaded. So nothing else may use the GPU.

"All visual tokens" is the same bundle at ratio 1: FoPru's scores are computed but not used. By arithmetic the
run needs 100 GB of disk. Packages: torch and onnxruntime-gpu for CUDA, and tensorrt-rtx or tensorrt.
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
from gpu_report import COMPILED, SDPA, TOLERANCE, agreement, report, speed_ups
from measure import polling, processor
from numpy.typing import NDArray
from rounds import WARM_UP, Contestant, ContestantError

import visprune
from visprune.cores import available_memory
from visprune.errors import UnsupportedError
from visprune.machine import Gpu
from visprune.machine import gpu as first_gpu
from visprune.targets import target as known_target
from visprune.targets import tensorrt

PRUNED = 0.25
ENGINES = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}  # targets by provider
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt")


def used_memory() -> float:
    """Return the MB of GPU memory that all processes use.

    Raises:
        OSError, subprocess.CalledProcessError: nvidia-smi is missing or fails.
    """
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)) * 1.048576


@dataclass(slots=True)
class Entry:
    """A contestant of the run: how it is started, and its results.

    Attributes:
        name: Name in tables.
        arguments: Arguments of `contestant.py`.
        pruned: Whether it keeps a quarter of the visual tokens.
        failure: Reason why it cannot run, or stopped; empty if it runs.
        memory: The most memory that it took in MB: of the GPU, or of the host in a rehearsal.
        logits: Logits of the first new token, [V].
        tokens: All new tokens.
        contestant: Its subprocess, once started.
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
        """Load it, and let it answer once; this counts as one of its warm-up rounds."""
        used = [used_memory() if gpu else 0.0]
        with polling(lambda: used.append(used_memory()), 0.05) if gpu else nullcontext():
            self.contestant = Contestant(self.name, self.arguments, errors)
            logits, tokens = self.contestant.answer()
        self.logits, self.tokens = np.array(logits), tuple(tokens)
        self.memory = max(used) - used[0] if gpu else self.contestant.memory.peak


def entries(args: argparse.Namespace, gpu: Gpu | None) -> Iterator[Entry]:
    """Yield all contestants; make their checkpoint, bundles and engines if they do not exist."""
    checkpoint = large.make(args.work / f"large-{args.layers}", args.layers)
    common = ["--steps", str(args.tokens - 1), "--threads", str(len(os.sched_getaffinity(0)))]
    # PyTorch has few kernels for float16 on a CPU.
    dtype = ["--dtype", "float16" if gpu else "float32", "--device", args.device]
    theirs = ["transformers", str(checkpoint), *dtype, *common]
    yield Entry(SDPA, theirs)
    yield Entry(COMPILED, [*theirs, "--compiled"])
    for provider, target in {args.device: "onnxruntime", **(ENGINES if gpu else {})}.items():
        failure, path = "", args.work / f"gpu-{target}-{args.layers}"
        try:
            make_bundle(checkpoint, path, target, gpu)
        except visprune.VispruneError as error:
            failure = str(error)
        for kept in (1.0, PRUNED):
            arguments = ["bundle", str(path), "--provider", provider, "--ratio", str(kept), *common]
            yield Entry(f"visprune {provider}, {kept:g}", arguments, kept < 1.0, failure)


def make_bundle(checkpoint: Path, path: Path, target: str, gpu: Gpu | None) -> None:
    """Export for a target, and build its engines for this GPU, unless that was done.

    Raises:
        VispruneError: The target does not take this GPU, its package is missing, or an engine cannot be
            built.
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
    """Return whether memory suffices to load all at once: 1.4 times the weights each, in float32 on a CPU."""
    weights = large.size_of(args.work / f"large-{args.layers}", "*.safetensors") / 1e6
    if gpu is not None:
        return len(found) * 1.4 * weights < (gpu.memory or 0) / 1e6 - used_memory()
    return len(found) * 2.8 * weights < (available_memory() or 0) / 1e6


def play(group: list[Entry], args: argparse.Namespace, gpu: Gpu | None) -> None:
    """Load all of a group, then let each repeat in turn; one that fails is left out from there on."""
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


def main() -> None:
    """Make bundles and engines, measure, and print."""
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
    gpu = first_gpu() if args.device == "cuda" else None
    if args.device == "cuda" and (gpu is None or shutil.which("nvidia-smi") is None):
        sys.exit("No GPU with nvidia-smi is found here. Add --layers 2 --device cpu for a rehearsal.")
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
        results |= {"agreement": list(agreement(done)), "speed-ups": list(speed_ups(done))}
        args.json.write_text(json.dumps(summary | results, indent=1))
    sys.exit(any(error > TOLERANCE for _, error, _ in agreement(done)))


if __name__ == "__main__":
    main()
