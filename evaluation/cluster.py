"""Workers on a Ray cluster. Images travel with the questions; bundles lie at the same path on each machine.

If a worker or machine dies, its questions are asked again elsewhere. Answers equal those of a single machine
if the processors compute with the same kernels.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from visprune.errors import BundleError, UnsupportedError, UsageError, VispruneError
from visprune.evaluation.answering import Answer, AnswerJob, answer, check
from visprune.evaluation.asking import AHEAD, Ask, windowed
from visprune.evaluation.questions import Question
from visprune.optional import require

__all__ = ["on_ray"]

_RETRIES = 3
_TIMEOUT = 10.0  # seconds to reach a cluster


@contextmanager
def on_ray(jobs: Sequence[AnswerJob]) -> Iterator[Ask]:
    """Join the cluster at `RAY_ADDRESS`, or else the one of this machine, and check each of its machines.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: There is no cluster, or no machine has enough processors for a worker.
        BundleError: A machine does not have the bundles at the same paths.
        UnsupportedError: A worker died in every retry.
    """
    ray = require("ray", extra="distributed")
    ours = not ray.is_initialized()
    if ours:
        _join(ray)
    try:
        threads = jobs[0].settings.threads
        needs = {"num_cpus": threads, "num_gpus": int(jobs[0].settings.provider != "cpu")}
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= threads]
        if not nodes:
            raise UsageError(
                f"No machine of the Ray cluster has {threads} processors for a worker.",
                "Use fewer --threads.",
            )
        _check_machines(ray, nodes, jobs)
        count = sum(int(node["Resources"]["CPU"]) // threads for node in nodes)
        task = ray.remote(**needs, max_retries=_RETRIES)(answer)

        def ask(job: AnswerJob, questions: Sequence[Question]) -> Iterator[Answer]:
            for done in windowed(
                questions, lambda q: task.remote(job, _with_image(q)), ray.wait, count * AHEAD
            ):
                yield _result(ray, done)

        yield ask
    finally:
        if ours:
            ray.shutdown()


def _join(ray: Any) -> None:
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        _reach(os.environ.get("RAY_ADDRESS", ""))
        ray.init(address="auto", log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"No Ray cluster can be joined: {said}.",
            "Start one with: ray start --head; or name one in RAY_ADDRESS.",
        ) from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)  # Ray replaces the command's handler by its own


def _reach(address: str) -> None:
    """Fail within seconds if nothing listens at the address; Ray itself would wait minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_TIMEOUT).close()


def _check_machines(ray: Any, nodes: Sequence[Any], jobs: Sequence[AnswerJob]) -> None:
    """Check that each machine has the bundles."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    task = ray.remote(num_cpus=0)(_check_bundles)
    found = [
        task.options(scheduling_strategy=strategy(node["NodeID"], soft=False)).remote(list(jobs))
        for node in nodes
    ]
    for reference in found:
        _result(ray, reference)


def _check_bundles(jobs: Sequence[AnswerJob]) -> None:
    """Check the bundles of the machine that this runs on."""
    for job in jobs:
        try:
            check(job)
        except BundleError as error:
            raise BundleError(
                f"On the machine {socket.gethostname()} of the cluster: {error.what}",
                "Copy the same bundle to the same path on each machine, or put it on a shared disk.",
            ) from None


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VispruneError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        said = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UnsupportedError(
            f"A worker of the Ray cluster died {_RETRIES + 1} times: {said}.",
            "Check that its machines have memory for the bundle, and run it again.",
        ) from None


def _with_image(question: Question) -> Question:
    """Return the question with the bytes of its image, because other machines do not have the file."""
    if isinstance(question.image, Path):
        with suppress(OSError):  # the worker reports what is wrong with it
            return replace(question, image=question.image.read_bytes())
    return question
