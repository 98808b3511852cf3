"""The thread that runs the models.

One thread loads all pipelines and then computes everything, because a backend's calls must not overlap and a
CUDA context belongs to a thread. It computes one token at a time: `admission` says which conversations are
active, and `order` whose turn it is.

One condition guards the queue, the order and the state. It is never held while a model computes, so the event
loop never waits for a model.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from visprune.serve import refusals
from visprune.serve.admission import Admission, Limits
from visprune.serve.errors import Refusal
from visprune.serve.jobs import Job, report
from visprune.serve.memory import MemoryPlan, warm_up

if TYPE_CHECKING:
    from visprune.runtime import Generation, Pipeline, Turn
    from visprune.serve.metrics import Metrics
    from visprune.serve.models import ServedModel

__all__ = ["Limits", "Scheduler", "State"]

State = Literal["loading", "ready", "draining", "stopped", "failed"]


class Scheduler:
    """Answers requests to several models in one thread.

    Args:
        models: Models to load.
        load: Loads the pipeline of a model. It is called in the thread.
        limits: Limits of the queue and of requests.
        metrics: Takes the figures.

    Attributes:
        failed: Error because of which the models could not be loaded, or None. One that is no VispruneError
            is a bug.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        load: Callable[[ServedModel], Pipeline],
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.failed: BaseException | None = None
        self._models = tuple(models)
        self._open = load
        self._limits = limits
        self._metrics = metrics
        self._pipelines: dict[str, Pipeline] = {}
        self._changed = threading.Condition()  # guards the state and the jobs
        self._state: State = "loading"
        self._jobs = Admission(limits)
        # A daemon, so that the process can end while a large model is being loaded.
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    @property
    def state(self) -> State:
        """State of the server; it answers requests in the state "ready"."""
        return self._state

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._state == "ready"

    @property
    def active(self) -> int:
        """Number of conversations that are being computed, with those that end at the next token."""
        return len(self._jobs.active)

    @property
    def queued(self) -> int:
        """Number of requests that wait to become active."""
        return len(self._jobs.waiting)

    @property
    def retry_after(self) -> int:
        """Seconds in which those that wait become active, by the durations of the latest requests."""
        with self._changed:
            return self._jobs.retry_after()

    @property
    def memory(self) -> MemoryPlan:
        """Memory as it was measured when all models were loaded."""
        return self._jobs.memory

    def start(self) -> None:
        """Begin to load the models. Call it once."""
        self._thread.start()

    async def loaded(self) -> None:
        """Wait until the models are loaded, or the server is drained or stopped.

        Raises:
            VispruneError: A model cannot be loaded.
        """
        await asyncio.to_thread(self._wait, lambda: self._state != "loading", None)
        if self.failed is not None:
            raise self.failed

    def pipeline(self, model_id: str) -> Pipeline:
        """Return the pipeline of a model, to prepare a turn with.

        Raises:
            Refusal: There is no such model, or requests are not accepted yet or any more.
        """
        ids = [model.id for model in self._models]
        if model_id not in ids:
            raise refusals.model_not_found(model_id, ids)
        with self._changed:
            self.check()
            return self._pipelines[model_id]

    def check(self) -> None:
        """Refuse a request unless the server is ready.

        Raises:
            Refusal: Requests are not accepted yet or any more.
        """
        refusals.check_state(self._state)

    def submit(self, model_id: str, turn: Turn) -> Job:
        """Queue a request. Call it in an asyncio task: the answer arrives in its event loop.

        Args:
            model_id: Name of the model.
            turn: What the `prepare` of this model's pipeline gave.

        Raises:
            Refusal: As for `pipeline`; the queue is full; or the conversation may need more memory than there
                is for all of them.
        """
        with self._changed:
            job = Job(model_id, self.pipeline(model_id), turn, self._end)
            self._jobs.enter(job)
            self._tell()
        job.limit(self._limits.queue_timeout, self._end_waiting)
        job.limit(self._limits.request_timeout, self._end_late)
        return job

    def drain(self) -> None:
        """Accept no new requests. Those that are active and queued go on."""
        with self._changed:
            if self._state in ("loading", "ready"):
                self._state = "draining"
                self._tell()

    async def drained(self, timeout: float | None = None) -> bool:
        """Wait so many seconds until no request is active or queued; return whether there is none."""
        return await asyncio.to_thread(self._wait, lambda: not self._jobs, timeout)

    def stop(self, timeout: float | None = None) -> bool:
        """End all requests at the next token, free the pipelines, and wait so many seconds for the thread.

        Return whether the thread has ended. It first loads a model to its end if it has begun to.
        """
        with self._changed:
            if self._state != "failed":
                self._state = "stopped"
            self._end_all(refusals.draining)
        if self._thread.ident is not None:  # it was started
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _wait(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def _tell(self) -> None:
        """Tell all who wait that something has changed. The condition is held."""
        self._metrics.occupied(self.queued, self.active, self._jobs.set_aside)
        self._changed.notify_all()

    def _end(self, job: Job, outcome: Generation | Refusal) -> None:
        """End a job, unless it has ended. From any thread."""
        with self._changed:
            if job.outcome is not None:
                return
            job.outcome = outcome
            self._jobs.leave(job)
            self._tell()
        self._metrics.ended(job.model, outcome, job.generated)
        job.close(outcome)

    def _end_all(self, refusal: Callable[[], Refusal]) -> None:
        with self._changed:
            for job in list(self._jobs):
                self._end(job, refusal())
            self._tell()

    def _end_waiting(self, job: Job) -> None:
        with self._changed:
            if job in self._jobs.waiting:
                again = self._jobs.retry_after()
                self._end(job, refusals.queue_timeout(self._limits.queue_timeout, again))

    def _end_late(self, job: Job) -> None:
        self._end(job, refusals.request_timeout(self._limits.request_timeout))

    # The following methods run in the thread of the models.

    def _run(self) -> None:
        try:
            self._load()
            while self._advance():
                pass
        except BaseException as error:
            with self._changed:
                is_bug = self._state not in ("loading", "stopped")
                if self._state != "stopped":
                    self.failed, self._state = error, "failed"
                self._end_all(refusals.internal_error)
            if is_bug:
                report(error)
        for job in list(self._jobs.active):
            self._release(job)
        for pipeline in self._pipelines.values():
            pipeline.close()
        self._pipelines.clear()

    def _load(self) -> None:
        needed = 0
        for model in self._models:
            if self._state != "loading":
                return
            pipeline = self._pipelines[model.id] = self._open(model)
            needed = max(needed, warm_up(pipeline))
            self._metrics.cached(model.id, pipeline.caches)
        plan = MemoryPlan.measure(self._limits.memory, list(self._pipelines.values()))
        plan.check(needed)
        with self._changed:
            self._jobs.memory = plan
            if self._state == "loading":
                self._state = "ready"
            self._tell()

    def _advance(self) -> bool:
        """Deal with one active job: compute its next token, or release it. Return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._state == "stopped" or bool(self._jobs.active))
            if self._state == "stopped":
                return False
            job = self._jobs.next()
        if job.outcome is None and (outcome := job.step(self._metrics)) is not None:
            self._end(job, outcome)
        if job.outcome is not None:
            self._release(job)
        return True

    def _release(self, job: Job) -> None:
        job.free()
        self._metrics.cached(job.model, job.pipeline.caches)
        with self._changed:
            self._jobs.release(job)
            self._tell()
