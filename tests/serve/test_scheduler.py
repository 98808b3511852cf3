"""The scheduler with scripted models: who computes, who waits, and who is turned away."""

from __future__ import annotations

import asyncio

import pytest
from scripted_models import Script, ScriptedPipeline, answered, figure, in_loop, serving, until

from visprune.errors import UsageError
from visprune.serve.admission import Admission
from visprune.serve.errors import Refusal
from visprune.serve.scheduler import Limits

pytest.importorskip("prometheus_client")


def test_answers_arrive_in_pieces_and_whole():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        assert scheduler.ready
        job = scheduler.submit("m0", Script("a"))
        pieces, result = await answered(job)
        assert pieces == ["a1 ", "a2 ", "a3 "]
        assert result.text == "".join(pieces)
        assert job.queue_ms >= 0
        await until(lambda: not scheduler.active)

    with serving(pipeline) as scheduler:
        in_loop(main(scheduler))
        assert figure(scheduler, 'visprune_generated_tokens_total{model="m0"}') == 3
        assert figure(scheduler, 'visprune_first_token_seconds_count{model="m0"}') == 1
        assert figure(scheduler, 'visprune_later_token_seconds_count{model="m0"}') == 2
        assert figure(scheduler, 'visprune_requests_total{finish="eos",model="m0"}') == 1
        assert figure(scheduler, "visprune_active_requests") == 0
    assert pipeline.threads == {"models"}
    assert pipeline.shut
    assert scheduler.state == "stopped"


def test_active_conversations_take_turns_and_the_queue_keeps_the_order_of_arrival():
    one, two = ScriptedPipeline(), ScriptedPipeline()
    two.log, two._busy = one.log, one._busy  # calls of two pipelines do not overlap either

    async def main(scheduler):
        await scheduler.loaded()
        one.log.clear()
        one.permit(0)
        two.permit(0)
        jobs = [scheduler.submit("m0", Script("a"))]
        await one.at_gate()  # a's first token is begun
        jobs += [scheduler.submit("m1", Script("b", tokens=5)), scheduler.submit("m0", Script("c"))]
        assert (scheduler.active, scheduler.queued) == (2, 1)
        two.permit(float("inf"))
        one.permit(float("inf"))
        texts = [result.text for _, result in await asyncio.gather(*map(answered, jobs))]
        assert texts == ["a1 a2 a3 ", "b1 b2 b3 b4 b5 ", "c1 c2 c3 "]
        assert "".join(one.log) == "ababa" + "cbcbcb"  # a's last token makes a place for c

    with serving(one, two, max_active=2) as scheduler:
        in_loop(main(scheduler))


def test_none_overtakes_another_even_if_it_needs_less_memory():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        first = scheduler.submit("m0", Script("a", tokens_in=30))  # 2 * (30 + 10) of 100 bytes
        large = scheduler.submit("m0", Script("b", tokens_in=30))
        small = scheduler.submit("m0", Script("c", tokens_in=0))
        assert (scheduler.active, scheduler.queued) == (1, 2)
        assert figure(scheduler, "visprune_conversation_memory_bytes") == 80
        assert figure(scheduler, "visprune_queued_requests") == 2
        large.cancel()
        assert (scheduler.active, scheduler.queued) == (2, 0)  # 80 + 20
        pipeline.permit(float("inf"))
        await asyncio.gather(answered(first), answered(small))
        await until(lambda: not scheduler.active)
        assert figure(scheduler, "visprune_conversation_memory_bytes") == 0

    with serving(pipeline, memory=100) as scheduler:
        in_loop(main(scheduler))


def test_one_that_can_never_have_its_memory_is_refused_with_the_numbers():
    async def main(scheduler):
        await scheduler.loaded()
        with pytest.raises(
            Refusal, match="60 tokens needs 120 B of memory, and the server has 100 B"
        ) as caught:
            scheduler.submit("m0", Script("a", tokens_in=50))
        assert (caught.value.status, caught.value.code) == (400, "context_too_large_for_memory")
        with pytest.raises(Refusal, match="1000 tokens needs"):  # the context ends an answer
            scheduler.submit("m0", Script("a", tokens_in=900, max_new_tokens=10**9))
        assert (scheduler.active, scheduler.queued) == (0, 0)
        await answered(scheduler.submit("m0", Script("a", tokens_in=40)))

    with serving(ScriptedPipeline(), memory=100) as scheduler:
        in_loop(main(scheduler))


def test_a_full_queue_refuses_at_once():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        jobs = [scheduler.submit("m0", Script(name)) for name in "abcd"]
        with pytest.raises(Refusal, match="queue is full, and 2 wait in it") as caught:
            scheduler.submit("m0", Script("e"))
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.retry_after >= 1
        assert (scheduler.active, scheduler.queued) == (2, 2)
        pipeline.permit(float("inf"))
        await asyncio.gather(*map(answered, jobs))
        await until(lambda: not scheduler.active)
        await answered(scheduler.submit("m0", Script("e")))

    with serving(pipeline, max_active=2, max_queue=2) as scheduler:
        in_loop(main(scheduler))


def test_without_a_queue_only_free_places_are_given():
    pipeline = ScriptedPipeline()

    async def main(scheduler):
        await scheduler.loaded()
        pipeline.permit(0)
        job = scheduler.submit("m0", Script("a"))
        with pytest.raises(Refusal, match="queue is full"):
            scheduler.submit("m0", Script("b"))
        pipeline.permit(float("inf"))
        await answered(job)

    with serving(pipeline, max_active=1, max_queue=0) as scheduler:
        in_loop(main(scheduler))


def test_limits_out_of_range_are_refused():
    for wrong in ({"max_active": 0}, {"max_queue": -1}, {"queue_timeout": 0}, {"memory": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Limits(**wrong)
    with pytest.raises(UsageError, match="request_timeout is nan"):
        Limits(request_timeout=float("nan"))


def test_the_time_to_come_again_follows_the_queue():
    jobs = Admission(Limits(max_active=2))
    assert jobs.retry_after() == 1
    jobs._durations.extend([10.0, 20.0])
    jobs.waiting.extend([None] * 3)
    assert jobs.retry_after() == 23  # 3 requests of 15 seconds on 2 places
