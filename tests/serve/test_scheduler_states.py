"""Loading, draining and stopping."""

from __future__ import annotations

import asyncio
import threading

import pytest
from scripted_models import DEADLINE, Script, ScriptedPipeline, answered, in_loop, serving, until

from visprune.errors import BundleError
from visprune.serve.errors import Refusal
from visprune.serve.metrics import Metrics
from visprune.serve.models import ServedModel
from visprune.serve.scheduler import Limits, Scheduler

pytest.importorskip("prometheus_client")


def refused(call, *args) -> tuple[int, str, int | None]:
    with pytest.raises(Refusal) as caught:
        call(*args)
    return caught.value.status, caught.value.code, caught.value.retry_after


def scheduler_of(tmp_path, load, count: int = 1) -> Scheduler:
    models = [ServedModel(f"m{n}", tmp_path) for n in range(count)]
    return Scheduler(models, load, Limits(), Metrics())


def test_requests_are_refused_until_all_models_are_loaded(tmp_path):
    go, loaded = threading.Event(), []

    def load(model):
        loaded.append((model.id, threading.current_thread().name))
        if model.id == "m1":
            assert go.wait(DEADLINE)
        return ScriptedPipeline()

    scheduler = scheduler_of(tmp_path, load, 2)
    assert (scheduler.state, scheduler.ready) == ("loading", False)
    scheduler.start()

    async def main():
        await until(lambda: len(loaded) == 2)
        for model in ("m0", "m1"):
            assert refused(scheduler.pipeline, model) == (503, "loading", 5)
            assert refused(scheduler.submit, model, Script("a")) == (503, "loading", 5)
        assert refused(scheduler.pipeline, "m2")[:2] == (404, "model_not_found")
        go.set()
        await scheduler.loaded()
        assert scheduler.ready
        assert scheduler.memory.conversations
        await answered(scheduler.submit("m1", Script("a")))
        with pytest.raises(Refusal, match=r"no model 'm2'\. Ask for one of: m0, m1"):
            scheduler.pipeline("m2")

    in_loop(main())
    assert scheduler.stop(DEADLINE)
    assert loaded == [("m0", "models"), ("m1", "models")]


@pytest.mark.parametrize("error", [BundleError("It is odd.", "Export again."), MemoryError()])
def test_a_model_that_cannot_be_loaded_fails_the_server_and_frees_the_others(tmp_path, error):
    first = ScriptedPipeline()

    def load(model):
        if model.id == "m1":
            raise error
        return first

    scheduler = scheduler_of(tmp_path, load, 2)
    scheduler.start()

    async def main():
        with pytest.raises(type(error)) as caught:
            await scheduler.loaded()
        assert caught.value is error

    in_loop(main())
    assert scheduler.failed is error
    assert refused(scheduler.pipeline, "m0") == (503, "not_running", None)
    assert scheduler.stop(DEADLINE)
    assert scheduler.state == "failed"
    assert first.shut


def test_a_stop_during_loading_loads_no_further_model(tmp_path):
    go, loaded = threading.Event(), []

    def load(model):
        loaded.append(ScriptedPipeline())
        assert go.wait(DEADLINE)
        return loaded[-1]

    scheduler = scheduler_of(tmp_path, load, 3)
    scheduler.start()
    in_loop(until(lambda: loaded))
    assert not scheduler.stop(0.01)
    assert scheduler.state == "stopped"
    in_loop(scheduler.loaded())  # nobody waits for ever
    go.set()
    assert scheduler.stop(DEADLINE)
    assert [pipeline.shut for pipeline in loaded] == [True]
    assert refused(scheduler.pipeline, "m0") == (503, "draining", 5)


def test_a_drain_during_loading_has_nothing_to_wait_for(tmp_path):
    go = threading.Event()

    def load(model):
        assert go.wait(DEADLINE)
        return ScriptedPipeline()

    scheduler = scheduler_of(tmp_path, load)
    scheduler.start()
    scheduler.drain()
    assert in_loop(scheduler.drained(DEADLINE))
    go.set()
    assert scheduler.stop(DEADLINE)
    assert scheduler.failed is None


def test_stop_without_a_start(tmp_path):
    scheduler = scheduler_of(tmp_path, lambda model: ScriptedPipeline())
    assert scheduler.stop()
    assert scheduler.state == "stopped"


def test_a_drain_finishes_what_is_active_and_queued_and_accepts_nothing_new():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        jobs = [scheduler.submit("m0", Script(name)) for name in "abc"]
        scheduler.drain()
        scheduler.drain()
        assert scheduler.state == "draining"
        assert refused(scheduler.submit, "m0", Script("d")) == (503, "draining", 5)
        assert refused(scheduler.pipeline, "m0") == (503, "draining", 5)
        assert not await scheduler.drained(0.01)
        pipeline.permit(float("inf"))
        answers = await asyncio.gather(*map(answered, jobs))
        assert [result.text for _, result in answers] == [f"{n}1 {n}2 {n}3 " for n in "abc"]
        assert await scheduler.drained(DEADLINE)

    with serving(pipeline, max_active=1) as scheduler:
        in_loop(main(scheduler))
    assert pipeline.shut


def test_a_stop_tells_those_that_are_left():
    pipeline = ScriptedPipeline()

    async def told(job):
        with pytest.raises(Refusal) as caught:
            await answered(job)
        return caught.value.status, caught.value.code, caught.value.retry_after

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(1)
        jobs = [scheduler.submit("m0", Script(name, tokens=10**9)) for name in "ab"]
        await pipeline.at_gate()
        assert not scheduler.stop(0.01)  # in the middle of a token
        assert await asyncio.gather(*map(told, jobs)) == [(503, "draining", 5)] * 2
        pipeline.permit(float("inf"))
        assert await asyncio.to_thread(scheduler.stop, DEADLINE)

    with serving(pipeline, max_active=1) as scheduler:
        in_loop(main(scheduler))
    assert pipeline.closed.count("a") == 1
    assert "b" not in pipeline.log
    assert (scheduler.active, scheduler.queued) == (0, 0)


def test_an_error_of_the_scheduler_itself_tells_all_who_wait(monkeypatch, capfd):
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        jobs = [scheduler.submit("m0", Script(name)) for name in "ab"]
        await pipeline.at_gate()
        monkeypatch.setattr(scheduler._jobs, "next", None)
        pipeline.permit(float("inf"))
        for job in jobs:
            with pytest.raises(Refusal) as caught:
                await answered(job)
            assert caught.value.code == "internal_error"
        assert scheduler.state == "failed"
        assert refused(scheduler.submit, "m0", Script("c"))[:2] == (503, "not_running")

    with serving(pipeline, max_active=1) as scheduler:
        in_loop(main(scheduler))
    assert pipeline.closed.count("a") == 1
    assert pipeline.shut
    assert "failed with TypeError" in capfd.readouterr().err
