"""How requests end before their answer is complete: time limits, clients that go away, errors."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
import weakref
from contextlib import suppress

import pytest
from scripted_models import (
    Script,
    ScriptedPipeline,
    ScriptedStream,
    answered,
    figure,
    in_loop,
    refusal,
    serving,
    until,
)

from visprune.errors import BundleError, InputError
from visprune.serve.errors import Refusal
from visprune.serve.jobs import report

pytest.importorskip("prometheus_client")


def test_the_time_limit_of_the_queue_ends_one_that_waits_while_a_token_takes_long():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        running = scheduler.submit("m0", Script("a"))
        late = await refusal(scheduler.submit("m0", Script("b")))
        assert (late.status, late.code) == (503, "queue_timeout")
        assert late.retry_after >= 1
        assert (scheduler.active, scheduler.queued) == (1, 0)
        pipeline.permit(float("inf"))
        await answered(running)
        assert "b" not in pipeline.log

    with serving(pipeline, max_active=1, queue_timeout=0.05) as scheduler:
        in_loop(main(scheduler))
        assert figure(scheduler, 'visprune_requests_total{finish="queue_timeout",model="m0"}') == 1


def test_the_time_limit_of_a_request_ends_it_at_its_next_token_and_tells_it_at_once():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        late = await refusal(scheduler.submit("m0", Script("a")))
        assert (late.status, late.code) == (504, "request_timeout")
        assert scheduler.active == 1
        pipeline.permit(float("inf"))
        await until(lambda: not scheduler.active)
        assert pipeline.log.count("a") == pipeline.closed.count("a") == 1

    with serving(pipeline, request_timeout=0.05) as scheduler:
        in_loop(main(scheduler))
        assert figure(scheduler, 'visprune_requests_total{finish="request_timeout",model="m0"}') == 1


def test_a_time_limit_after_some_text_is_told_in_the_same_way():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(1)
        job = scheduler.submit("m0", Script("a"))
        events = job.events()
        assert await anext(events) == "a1 "
        job._timers[-1]._run()  # now, instead of after five minutes
        with pytest.raises(Refusal, match="not complete after 300 seconds"):
            await anext(events)

    with serving(pipeline) as scheduler:
        in_loop(main(scheduler))


def test_the_time_limit_of_the_queue_does_not_end_what_is_active():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        job = scheduler.submit("m0", Script("a"))
        await asyncio.sleep(0.2)
        pipeline.permit(float("inf"))
        assert (await answered(job))[1].text == "a1 a2 a3 "

    with serving(pipeline, queue_timeout=0.02) as scheduler:
        in_loop(main(scheduler))


def test_cancelling_frees_an_active_job_at_the_next_token_and_a_waiting_one_at_once():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        active, waiting, last = (scheduler.submit("m0", Script(name, tokens=9)) for name in "abc")
        await pipeline.at_gate()
        for _ in range(3):  # more often does no harm, from whatever thread
            thread = threading.Thread(target=waiting.cancel)
            thread.start()
            thread.join()
            active.cancel()
        assert (scheduler.active, scheduler.queued) == (1, 1)
        stream = weakref.ref(active._stream)
        pipeline.permit(1)
        await until(lambda: "a" in pipeline.closed)
        await until(lambda: scheduler.queued == 0)  # the place is c's
        gc.collect()
        assert stream() is None
        assert pipeline.log.count("a") == 1
        assert (await refusal(waiting)).code == "client_gone"
        pipeline.permit(float("inf"))
        await answered(last)

    with serving(pipeline, max_active=1) as scheduler:
        in_loop(main(scheduler))
        assert figure(scheduler, 'visprune_requests_total{finish="client_gone",model="m0"}') == 2


@pytest.mark.parametrize("way", ["task", "aclose", "with", "before"])
def test_a_consumer_that_goes_away_cancels(way):
    pipeline = ScriptedPipeline()

    async def consume(job):
        async with job:
            async for _ in job.events():
                pass

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(1)
        job = scheduler.submit("m0", Script("a", tokens=10**9))
        if way == "task":
            task = asyncio.create_task(consume(job))
            await pipeline.at_gate()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "aclose":
            events = job.events()
            await anext(events)
            await events.aclose()
        elif way == "with":
            async with job:
                async for _ in job.events():
                    break
        else:
            async with job:
                pass
        pipeline.permit(float("inf"))
        await until(lambda: not scheduler.active)
        assert scheduler.ready

    with serving(pipeline) as scheduler:
        in_loop(main(scheduler))


def test_an_event_loop_that_is_gone_ends_its_jobs():
    pipeline = ScriptedPipeline()

    async def leave(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        scheduler.submit("m0", Script("a", tokens=10**9))
        await pipeline.at_gate()

    async def stay(scheduler):
        await until(lambda: not scheduler.active)
        assert (await answered(scheduler.submit("m0", Script("b"))))[1].text == "b1 b2 b3 "

    with serving(pipeline) as scheduler:
        in_loop(leave(scheduler))
        pipeline.permit(float("inf"))
        in_loop(stay(scheduler))


class Panic(BaseException):
    """What a panic of a library in Rust is: no Exception."""


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InputError("The picture is odd.", "Give another."), 400, "invalid_request"),
        (BundleError("The graph is odd.", "Export again."), 500, "model_failed"),
        (MemoryError("secret"), 500, "internal_error"),
        (ValueError("secret"), 500, "internal_error"),
        (Panic("secret"), 500, "internal_error"),
    ],
)
def test_an_error_ends_only_its_own_job(error, status, code, capfd):
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        bad = scheduler.submit("m0", Script("bad", error=error))
        good = scheduler.submit("m0", Script("good"))
        pipeline.permit(float("inf"))
        found, (pieces, _) = await asyncio.gather(refusal(bad), answered(good))
        assert (found.status, found.code) == (status, code)
        assert "secret" not in found.message
        assert pieces == ["good1 ", "good2 ", "good3 "]
        await until(lambda: not scheduler.active)
        assert sorted(pipeline.closed) == ["bad", "good"]
        await answered(scheduler.submit("m0", Script("after")))

    with serving(pipeline) as scheduler:
        in_loop(main(scheduler))
    said = capfd.readouterr().err
    assert "secret" not in said
    assert (f"{type(error).__name__}" in said and "in step" in said) == (code == "internal_error")


def test_a_stream_that_cannot_be_closed_gives_its_place_back(capfd, monkeypatch):
    pipeline = ScriptedPipeline()

    def close(stream):
        raise ValueError

    async def main(scheduler):
        await scheduler.loaded()
        monkeypatch.setattr(ScriptedStream, "close", close)
        for name in "ab":
            assert (await answered(scheduler.submit("m0", Script(name))))[1].text
        await until(lambda: not scheduler.active)
        assert scheduler.ready

    with serving(pipeline, max_active=1) as scheduler:
        in_loop(main(scheduler))
    assert capfd.readouterr().err.count("failed with ValueError") == 2


def test_a_job_that_was_ended_needs_no_garbage_collector():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        job = scheduler.submit("m0", Script("a"))
        gone = weakref.ref(job)
        job.cancel()
        with suppress(Refusal):
            async for _ in job.events():
                pass
        del job
        await until(lambda: not scheduler.active)
        await until(lambda: gone() is None)

    gc.disable()
    try:
        with serving(pipeline) as scheduler:
            in_loop(main(scheduler))
    finally:
        gc.enable()


def test_fifty_jobs_that_are_cancelled_at_random_leave_nothing():
    pipeline = ScriptedPipeline()
    rng = random.Random(0)
    refusals = []

    async def client(scheduler, number):
        while True:
            try:
                job = scheduler.submit("m0", Script(f"c{number}.", tokens=rng.randrange(1, 30)))
                break
            except Refusal as full:
                refusals.append(full.code)
                await asyncio.sleep(rng.random() / 100)
        leave, pieces = rng.choice([None, 0, 1, 5]), []
        async with job:
            async for event in job.events():
                if not isinstance(event, str):
                    assert event.text == "".join(pieces)
                    return "answered"
                pieces.append(event)
                assert event == f"c{number}.{len(pieces)} "
                if len(pieces) == leave:
                    break
        return "left"

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        clients = [asyncio.create_task(client(scheduler, number)) for number in range(50)]
        await pipeline.at_gate()
        assert refusals[:38] == ["queue_full"] * 38  # 4 are active and 8 wait
        pipeline.permit(float("inf"))
        assert set(await asyncio.gather(*clients)) == {"answered", "left"}
        await until(lambda: not scheduler.active)
        assert scheduler.queued == 0
        assert scheduler._jobs.set_aside == 0

    with serving(pipeline, max_queue=8) as scheduler:
        in_loop(main(scheduler))


def test_a_log_that_nobody_reads_ends_nothing(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    for stream in (None, Gone()):
        monkeypatch.setattr(sys, "stderr", stream)
        report(ValueError("a prompt"))
