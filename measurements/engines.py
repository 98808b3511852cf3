"""Size, build time and host memory of TensorRT-RTX engines for three kinds of GPU; no GPU is needed.

    python measurements/engines.py --work /tmp/visprune-bench [--only demo qwen2-0.5b llava-7b]

Models: the demo model; CLIP ViT-L/14-336 with Qwen2-0.5B's shapes; and the same tower with four layers of
LLaVA-1.5-7B's width. The last two have random weights. Each is built in float16, int8 and fp8, with one
decoder and with a decoder in segments. Every engine is built; none is taken from a cache. Figures are kept in
WORK/engines.json, and a second run continues where the first ended. Bundles and engines are removed when they
are measured; by arithmetic they take at most 15 GB besides the checkpoints.

Seconds and peak host memory are those of the process that builds an engine, read from /proc every 20 ms
(Linux). The exit code is 1 if something was not built.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import large
import model
from measure import Memory, polling, processor

import visprune
from visprune.bundled import CALIBRATION
from visprune.pruning.fitprune import FitPrune

FLOAT = "fp16"
SMS = {FLOAT: (86, 89, 120), "int8": (86, 89, 120), "fp8": (89, 120)}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and the export options of each of its methods."""

    checkpoint: Callable[[Path], Path | None]
    methods: dict[str, dict[str, Any]]


METHODS: dict[str, dict[str, Any]] = {
    "fopru-rank": {"method": "fopru-rank", "ratio": 0.25},
    "fopru-rank, 2 segments": {"method": "fopru-rank", "ratio": 0.25, "segments": 2},
    "fastv": {"method": "fastv"},
}
CASES = {
    "demo": Case(lambda work: None, METHODS | {"fitprune": {"method": FitPrune((60, 0, 0), 144, 0.7)}}),
    "qwen2-0.5b": Case(lambda work: model.make(work / "checkpoint-float16", "float16"), METHODS),
    "llava-7b": Case(lambda work: large.make(work / "large-4", 4), METHODS),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one engine, or the failure of a bundle.

    Attributes:
        case: Name of the model.
        method: Name of the method.
        precision: Precision of the bundle.
        sm: SM of the GPU that the engine is for.
        graph: Name of the graph; empty for a failure.
        size: Size of the engine in MB.
        seconds: Seconds that the process took that built it.
        peak: Peak host memory of that process in MB.
        failure: Error message; empty if the engine was built.
    """

    case: str
    method: str
    precision: str
    sm: int
    graph: str
    size: float = 0.0
    seconds: float = 0.0
    peak: float = 0.0
    failure: str = ""

    @property
    def bundle(self) -> tuple[str, str, str, int]:
        """The bundle that it was built from, and the SM that it is for."""
        return self.case, self.method, self.precision, self.sm


class Watch:
    """Watch over the processes that this thread starts while it builds a bundle's engines.

    Attributes:
        found: Seconds and MB of peak host memory, by graph.
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}
        self._children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
        self._starts: dict[str, float] = {}
        self._graph = ""

    def progress(self, what: str, done: int, total: int) -> None:
        """Note which graph is built next, from the progress of `visprune.build`."""
        if what.startswith("building "):
            self._graph = what.split()[1]

    def read(self) -> None:
        """Read time and memory of the processes; of each, the last reading counts.

        Until a new process runs its own program, it has the peak of its parent.
        """
        for child in self._children.read_text().split():
            with suppress(OSError, KeyError):  # the process has just ended
                now = time.perf_counter()
                self.found[self._graph] = (now - self._starts.setdefault(child, now), Memory.of(child).peak)


class Matrix:
    """All figures, written to a file after each bundle, and the temporary folders."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._file = work / "engines.json"
        content = json.loads(self._file.read_text()) if self._file.is_file() else []
        self.rows = [row for row in (Row(**values) for values in content) if not row.failure]

    def run(self, case: str) -> None:
        """Measure all engines of one model that have no figures yet."""
        self._remove("built", "cache", "float", "quantized")  # a killed run may have left them
        for method in CASES[case].methods:
            for precision, sms in SMS.items():
                for sm in sms:
                    self._measure(Row(case, method, precision, sm, ""))
                    self._remove("built", "cache")
                self._remove("quantized")
            self._remove("float")

    def _measure(self, wanted: Row) -> None:
        if any(row.bundle == wanted.bundle for row in self.rows):
            return
        print(*wanted.bundle, file=sys.stderr, flush=True)
        self.rows += self._build(wanted)
        self._file.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))

    def _build(self, wanted: Row) -> list[Row]:
        watch, made = Watch(), []
        try:
            source = self._source(wanted)
            with polling(watch.read, 0.02):
                built = visprune.build(
                    source, self._work / "built", sm=(wanted.sm,), force=True, progress=watch.progress
                )
        except visprune.VispruneError as error:
            return [replace(wanted, failure=str(error))]
        for engine in built.manifest.engines:
            size = built.file(engine.file).stat().st_size / 1e6
            seconds, peak = watch.found[engine.graph]
            made.append(replace(wanted, graph=engine.graph, size=size, seconds=seconds, peak=peak))
        return made

    def _source(self, wanted: Row) -> visprune.Bundle:
        """Return the bundle to build from; export and quantize it unless that was done."""
        whole, quantized = self._work / "float", self._work / "quantized"
        if not whole.is_dir():
            case = CASES[wanted.case]
            options = case.methods[wanted.method]
            visprune.export(case.checkpoint(self._work), target="rtx", output=whole, verify=False, **options)
        if wanted.precision != FLOAT and not quantized.is_dir():
            # As fast as possible, with any error: with random weights, the error has no meaning.
            visprune.quantize(
                whole,
                quantized,
                precision=wanted.precision,
                calibration=CALIBRATION,
                samples=2,
                ranges="max",
                smooth=False,
                error_budget=math.inf,
                timing=False,
            )
        return visprune.Bundle.open(whole if wanted.precision == FLOAT else quantized)

    def _remove(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self._work / name, ignore_errors=True)


def show(rows: list[Row]) -> None:
    """Print a line for each graph, and one for each bundle with sums and the highest peak."""
    title = "MB, seconds, peak of host memory in MB"
    print(f"{title:68s}" + "".join(f"{f'SM{sm}':>22s}" for sm in SMS[FLOAT]))
    bundles: dict[str, dict[str, dict[int, list[Row]]]] = {}
    for row in rows:
        graphs = bundles.setdefault(f"{row.case:10s}  {row.method:22s}  {row.precision:4s}", {"all": {}})
        for graph in (row.graph, "all"):
            graphs.setdefault(graph, {}).setdefault(row.sm, []).append(row)
    for name, graphs in bundles.items():
        for graph, engines in (*list(graphs.items())[1:], ("all", graphs["all"])):
            cells = [_cell(engines[sm]) if sm in engines else "-" for sm in SMS[FLOAT]]
            print(f"{name:44s}{graph:24s}" + "".join(f"{cell:>22s}" for cell in cells))


def _cell(engines: list[Row]) -> str:
    if any(row.failure for row in engines):
        return "failed"
    size, seconds = sum(row.size for row in engines), sum(row.seconds for row in engines)
    return f"{size:.1f}  {seconds:.1f}  {max(row.peak for row in engines):.0f}"


def main() -> None:
    """Build the engines that have no figures yet; print the table and the failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(args.work / "cache")  # a cache of its own, so that it can be removed
    matrix = Matrix(args.work)
    for case in args.only:
        matrix.run(case)
    rows = [row for row in matrix.rows if row.case in args.only]
    show(rows)
    print(f"\n{processor()}, {model.THREADS} threads, TensorRT-RTX {metadata.version('tensorrt-rtx')}")
    failures = [row for row in rows if row.failure]
    print(f"{len(rows) - len(failures)} engines built, {len(failures)} bundles failed")
    for row in failures:
        print(*row.bundle, row.failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
