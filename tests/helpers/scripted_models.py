"""Models that follow a script and can be stopped at any token, to try the scheduler's rules and races."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from visprune.runtime.generation import Generation
from visprune.serve.errors import Refusal
from visprune.serve.jobs import Job
from visprune.serve.metrics import Metrics
from visprune.serve.models import ServedModel
from visprune.serve.scheduler import Limits, Scheduler

DEADLINE = 60.0  # seconds; a test that needs them has failed


@dataclass(eq=False)
class Script:
    """A turn: the number of its tokens, and the error at the third one if there is one."""

    name: str
    tokens: int = 3
    tokens_in: int = 10
    max_new_tokens: int = 10
    error: BaseException | None = None


class ScriptedStream:
    def __init__(self, pipeline: ScriptedPipeline, script: Script) -> None:
        self.pipeline, self.script, self.done, self.closed = pipeline, script, 0, False

    def step(self) -> str | None:
        assert not self.closed
        with self.pipeline.alone():
            if self.ended:
                return None
            self.pipeline.pass_gate()
            if self.script.error is not None and self.done == 2:
                raise self.script.error
            self.pipeline.log.append(self.script.name)
            self.done += 1
            return f"{self.script.name}{self.done} "

    @property
    def ended(self) -> bool:
        return self.done == self.script.tokens

    def close(self) -> None:
        self.closed = True
        self.pipeline.closed.append(self.script.name)

    @property
    def result(self) -> Generation:
        return Generation(
            text="".join(f"{self.script.name}{number + 1} " for number in range(self.done)),
            token_ids=tuple(range(self.done)),
            tokens_in=self.script.tokens_in,
            tokens_kept=4,
            visual_tokens=16,
            keep_indices=((0, 1, 2, 3),),
            merged_indices=((),),
            layer_tokens=(),
            finish_reason="eos",
            tokens_cached=7,
            images_cached=0,
            timings_ms={},
        )


@dataclass(eq=False)
class ScriptedPipeline:
    """Attributes: the names of turns in the order of their tokens, and of closed streams; calling threads."""

    log: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    shut: bool = False

    def __post_init__(self) -> None:
        cache = {"limit": 0, "bytes": 0, "hits": 0, "misses": 0, "clear": lambda: None}
        self.caches = SimpleNamespace(pictures=SimpleNamespace(**cache), prefixes=SimpleNamespace(**cache))
        self.manifest = SimpleNamespace(decoder=SimpleNamespace(context_limit=1000))
        self._busy = threading.Lock()
        self._gate = threading.Condition()
        self._permits: float = float("inf")
        self._standing = False

    def cache_bytes(self, tokens: int) -> int:
        return tokens

    def prepare(self, messages: Any, max_new_tokens: int) -> Script:
        return Script("warm-up", tokens=1)

    def answer(self, script: Script) -> ScriptedStream:
        return ScriptedStream(self, script)

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.shut = True

    @contextmanager
    def alone(self) -> Iterator[None]:
        assert self._busy.acquire(blocking=False), "two calls overlap"
        self.threads.add(threading.current_thread().name)
        try:
            yield
        finally:
            self._busy.release()

    def pass_gate(self) -> None:
        with self._gate:
            self._standing = self._permits <= 0
            self._gate.notify_all()
            assert self._gate.wait_for(lambda: self._permits > 0, DEADLINE)
            self._standing = False
            self._permits -= 1

    def permit(self, tokens: float) -> None:
        """Let so many tokens be computed from now on; the next one waits."""
        with self._gate:
            self._permits = tokens
            self._gate.notify_all()

    async def at_gate(self) -> None:
        """Wait until the thread of the models stands before a token that it may not compute."""

        def wait() -> bool:
            with self._gate:
                return self._gate.wait_for(lambda: self._standing and self._permits <= 0, DEADLINE)

        assert await asyncio.to_thread(wait)


@contextmanager
def serving(*pipelines: Any, **limits: Any) -> Iterator[Scheduler]:
    """A scheduler for models m0, m1 ...; afterwards its thread must end."""
    models = [ServedModel(f"m{number}", Path(f"m{number}")) for number in range(len(pipelines))]
    by_id = {model.id: pipeline for model, pipeline in zip(models, pipelines, strict=True)}
    scheduler = Scheduler(models, lambda model: by_id[model.id], Limits(**limits), Metrics())
    scheduler.start()
    try:
        yield scheduler
    finally:
        for pipeline in pipelines:
            if isinstance(pipeline, ScriptedPipeline):
                pipeline.permit(float("inf"))
        assert scheduler.stop(DEADLINE)


async def answered(job: Job) -> tuple[list[Any], Any]:
    """Return the pieces of an answer, and the answer."""
    events = [event async for event in job.events()]
    return events[:-1], events[-1]


def in_loop(main: Any) -> Any:
    """Run a coroutine, with a deadline. A browser of other tests may have an event loop in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, asyncio.wait_for(main, DEADLINE)).result()


async def until(condition: Any) -> None:
    """Wait until something is true."""
    end = asyncio.get_running_loop().time() + DEADLINE
    while not condition():
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.002)


async def refusal(job: Job) -> Refusal:
    """Return the refusal that ends a job."""
    try:
        await answered(job)
    except Refusal as found:
        return found
    raise AssertionError("the job has an answer")


def figure(scheduler: Scheduler, line: str) -> float:
    """Return the value of a line of the metrics, or 0 if there is none."""
    rows = scheduler._metrics.render()[0].decode().splitlines()
    return next((float(row.split()[-1]) for row in rows if row.startswith(line + " ")), 0.0)
