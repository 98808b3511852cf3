"""Measurement in rounds: each row is timed once in every round, in a new random order.

So a slowdown of the machine affects all rows alike, and no row profits from the one that runs before it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from visprune.bench.measure.energy import counter
from visprune.bench.measure.gpu import NvmlGpu
from visprune.bench.measure.protocol import Contender, Done
from visprune.bench.measure.worker_process import Worker
from visprune.bench.report.report import Repetition, Workload
from visprune.errors import UsageError
from visprune.progress import Progress

__all__ = ["Measured", "Timed", "measure"]

_REST = 0.02  # seconds between two rows, because idle threads of some libraries spin for a while


@dataclass(slots=True)
class Timed:
    """The measurements of one row.

    Attributes:
        contender: The model that the row runs.
        load: Milliseconds to load it.
        last: The last repetition.
        repetitions: All repetitions after the warm-up.
        device_bytes: The most GPU memory seen after a repetition.
        overlays: The overlay of each image, JPEG in base64.
    """

    contender: Contender
    load: float
    last: Done | None = None
    repetitions: list[Repetition] = field(default_factory=list)
    device_bytes: int | None = None
    overlays: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of all rows, with the names of the GPU and of the energy counter."""

    rows: tuple[Timed, ...]
    gpu: str | None
    energy_counter: str


def measure(contenders: Sequence[Contender], work: Workload, progress: Progress) -> Measured:
    """Load every row in a worker process of its own, and time all of them.

    Args:
        contenders: The models of the rows.
        work: The work of each row in each round.
        progress: Called before each step.

    Raises:
        VispruneError: A row cannot be loaded or run, or its worker was ended.
    """
    gpu = None if work.provider == "cpu" else NvmlGpu.find()
    order = np.random.default_rng(0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="visprune-bench-")))
        energy = stack.enter_context(counter(gpu))
        workers = [
            stack.enter_context(Worker(one, _made(folder / str(i)))) for i, one in enumerate(contenders)
        ]
        rows = []
        for index, worker in enumerate(workers):  # one by one, so that none slows another down
            progress("loading", index, len(workers))
            rows.append(Timed(worker.contender, worker.load(work).load))
        progress("loading", len(workers), len(workers))
        total = work.warm_up + work.rounds
        for turn in range(total):
            what = "warming up" if turn < work.warm_up else "timing"
            first, count = (0, work.warm_up) if turn < work.warm_up else (work.warm_up, work.rounds)
            for done, index in enumerate(order.permutation(len(workers))):
                progress(what, (turn - first) * len(workers) + done, count * len(workers))
                time.sleep(_REST)
                worker = workers[index]
                uncounted = worker.repeat()  # the processor's caches hold another row's weights
                if uncounted.new_tokens < work.max_new_tokens:
                    raise _too_many(worker.contender.name, uncounted.new_tokens, work)
                before = energy.joules()
                found = worker.repeat()
                after = energy.joules()
                row, repetition = rows[index], found.repetition
                if before is not None and after is not None:
                    repetition = replace(repetition, energy=after - before)
                row.last = found
                if turn >= work.warm_up:
                    row.repetitions.append(repetition)
                used = gpu.process_bytes(worker.pid) if gpu else None
                row.device_bytes = used if row.device_bytes is None else max(row.device_bytes, used or 0)
            if turn == work.warm_up - 1 or turn == total - 1:
                progress(what, count * len(workers), count * len(workers))
        for row, worker in zip(rows, workers, strict=True):
            row.overlays = worker.overlays()
        return Measured(tuple(rows), gpu.name if gpu else None, energy.about)


def _too_many(name: str, generated: int, work: Workload) -> UsageError:
    return UsageError(
        f"{name} has room for {generated} new tokens, and {work.max_new_tokens} are to be generated.",
        f"Give --max-new-tokens {generated}, or less.",
    )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
