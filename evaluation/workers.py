"""The processes that answer: this one, several of this machine, or those of a Ray cluster.

All give the same answers, in any order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for

from visprune.cores import available_memory, usable_cores
from visprune.errors import UnsupportedError, UsageError
from visprune.evaluation.answering import Answer, AnswerJob, answer, close
from visprune.evaluation.asking import AHEAD, Ask, windowed
from visprune.evaluation.cluster import on_ray
from visprune.evaluation.questions import Question

__all__ = ["Workers", "open_workers"]

_MOST_PROCESSES = 1024
_PROCESS = 200_000_000  # bytes that Python, NumPy and ONNX Runtime take


@dataclass(frozen=True, slots=True)
class Workers:
    """The choice of processes that answer.

    Attributes:
        processes: Number of processes of this machine. None: as many as cores and memory allow.
        ray: Whether to use all of a Ray cluster instead.

    Raises:
        UsageError: The number is out of range, or both are given.
    """

    processes: int | None = None
    ray: bool = False

    def __post_init__(self) -> None:
        if self.processes is not None and not 1 <= self.processes <= _MOST_PROCESSES:
            raise UsageError(
                f"Cannot run {self.processes} processes.", f"Give a number from 1 to {_MOST_PROCESSES}."
            )
        if self.ray and self.processes is not None:
            raise UsageError(
                "On a Ray cluster, the number of workers follows from its machines.", "Leave --processes out."
            )

    def count(self, threads: int, largest: int) -> int:
        """Return the number of processes of this machine, for bundles of at most `largest` bytes."""
        if self.processes is not None:
            return self.processes
        memory = available_memory()
        fit = usable_cores() if memory is None else memory // (_PROCESS + 2 * largest)  # float16 is widened
        return max(1, min(usable_cores() // threads, fit))


def open_workers(
    workers: Workers, jobs: Sequence[AnswerJob], questions: int, largest: int
) -> AbstractContextManager[Ask]:
    """Start the workers; they end with the context.

    Args:
        workers: The choice of processes.
        jobs: All jobs that will be asked.
        questions: Number of questions.
        largest: Bytes of the largest bundle.

    Raises:
        MissingExtraError: Ray is wanted and not installed.
        UsageError: There is no Ray cluster.
        BundleError: A machine of the cluster does not have the bundles.
    """
    if workers.ray:
        return on_ray(jobs)
    processes = min(questions, workers.count(jobs[0].settings.threads, largest))
    return _here() if processes <= 1 else _processes(processes)


@contextmanager
def _here() -> Iterator[Ask]:
    try:
        yield lambda job, questions: (answer(job, question) for question in questions)
    finally:
        close()


@contextmanager
def _processes(count: int) -> Iterator[Ask]:
    others = multiprocessing.active_children()
    # Not forked: the threads of a loaded graph do not survive a fork.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _end_with_parent)

    def some(futures: list[Future[Answer]]) -> tuple[list[Future[Answer]], list[Future[Answer]]]:
        done = wait(futures, return_when=FIRST_COMPLETED).done
        return [f for f in futures if f in done], [f for f in futures if f not in done]

    def ask(job: AnswerJob, questions: Sequence[Question]) -> Iterator[Answer]:
        def submit(question: Question) -> Future[Answer]:
            # Only this process handles Ctrl-C. A worker that the pool starts here inherits the blocked
            # signal, so that no interrupt can reach it while it starts.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return pool.submit(answer, job, question)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        try:
            for done in windowed(questions, submit, some, count * AHEAD):
                yield done.result()
        except BrokenProcessPool:
            raise UnsupportedError(
                "A worker process was ended from outside, as happens when memory runs out.",
                "Free some memory and run it again; with visprune-eval, give fewer --processes.",
            ) from None

    try:
        yield ask
    finally:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()  # it holds nothing that would have to be finished
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this worker end with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait_for([sentinel]), os._exit(1)), daemon=True).start()
