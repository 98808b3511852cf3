"""Who waits, who is active, and who is turned away.

Requests wait in one queue. The first of them becomes active as soon as there is a place and memory for it.
None overtakes another, even if it needs less memory. This module knows nothing of threads: its caller sees to
it that calls do not overlap.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from visprune.errors import UsageError
from visprune.serve import refusals
from visprune.serve.jobs import Job
from visprune.serve.memory import MemoryPlan
from visprune.serve.order import Order

__all__ = ["Admission", "Limits"]

_REMEMBERED = 16  # requests whose durations tell how fast the queue moves


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of what is accepted and computed at once.

    Attributes:
        max_active: Conversations that are computed in turn.
        max_queue: Requests that may wait besides these.
        queue_timeout: Seconds that a request may wait to become active.
        request_timeout: Seconds from a request's arrival to the end of its answer.
        memory: Bytes that active conversations may take together; None to measure after loading.

    Raises:
        UsageError: A limit is out of range.
    """

    max_active: int = 4
    max_queue: int = 16
    queue_timeout: float = 60.0
    request_timeout: float = 300.0
    memory: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_active", 1), ("max_queue", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}.", f"Give a number of at least {least}.")
        for name in ("queue_timeout", "request_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}.", "Give a number of seconds above 0.")
        if self.memory is not None and self.memory < 1:
            raise UsageError(f"memory is {self.memory}.", "Give a number of bytes above 0, or leave it out.")


class Admission:
    """The queue and the active conversations.

    Args:
        limits: Limits of both.

    Attributes:
        memory: Memory that conversations may take.
        waiting: Jobs in the queue, in the order of their arrival.
        active: Active jobs in the order of their turns, with those that have ended and are not yet released.
        set_aside: Bytes for the active jobs.
    """

    def __init__(self, limits: Limits) -> None:
        self.memory = MemoryPlan(None, None, 0, limits.memory)
        self.waiting: deque[Job] = deque()
        self.active: Order[Job] = Order()
        self.set_aside = 0
        self._limits = limits
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    def __iter__(self) -> Iterator[Job]:
        yield from self.waiting
        yield from self.active

    def enter(self, job: Job) -> None:
        """Make a new job active, or queue it.

        Raises:
            Refusal: The queue is full, or the job needs more memory than all conversations may take.
        """
        bound = self.memory.conversations
        if bound is not None and job.memory > bound:
            raise refusals.too_large(job.length, job.memory, bound)
        self.waiting.append(job)
        self._admit()
        if len(self.waiting) > self._limits.max_queue:
            self.waiting.pop()
            raise refusals.queue_full(len(self.waiting), self.retry_after())

    def next(self) -> Job:
        """Return the active job to deal with: one that has ended, or else the one whose turn it is."""
        ended = (job for job in self.active if job.outcome is not None)
        return next(ended, None) or self.active.next()

    def leave(self, job: Job) -> None:
        """Take a job that has ended out of the queue. An active one stays until it is released."""
        if job in self.waiting:
            self.waiting.remove(job)
            self._admit()

    def release(self, job: Job) -> None:
        """Give the place and the memory of an active job to others."""
        self.active.remove(job)
        self.set_aside -= job.memory
        self._durations.append(time.monotonic() - job.admitted)
        self._admit()

    def retry_after(self) -> int:
        """Return the seconds in which those that wait become active, by the durations of the latest jobs."""
        mean = sum(self._durations) / max(1, len(self._durations))
        return max(1, math.ceil(mean * len(self.waiting) / self._limits.max_active))

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self._limits.max_active:
            job = self.waiting[0]
            bound = self.memory.conversations
            if bound is not None and self.set_aside + job.memory > bound:
                return
            self.waiting.popleft()
            job.admitted = time.monotonic()
            self.set_aside += job.memory
            self.active.add(job)
