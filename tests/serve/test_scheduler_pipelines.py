"""The scheduler with real pipelines: interleaved answers, cancellation and memory."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from itertools import pairwise

import numpy as np
import pytest
from scripted_models import DEADLINE, answered, in_loop, serving, until

from visprune.demo.scenes import questions, scene
from visprune.runtime import Message, Sampling, Stream, load
from visprune.runtime.kv_cache import KVCache
from visprune.serve.errors import Refusal

pytest.importorskip("onnxruntime")
pytest.importorskip("prometheus_client")

QUESTIONS = ["a?", "What is it?", "colour", "How many are there in all?"]


@pytest.fixture(scope="module")
def alone(tiny_bundle):
    """A pipeline of its own, which answers one request after another."""
    with load(tiny_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture
def server(tiny_bundle):
    """Makes a scheduler for the tiny model."""

    def make(**limits):
        return serving(load(tiny_bundle, threads=1, prefix_cache=200_000, picture_cache=100_000), **limits)

    return make


def turn(pipeline, seed: int, picture, **options):
    """A turn of its own for every seed: a question, most with pictures."""
    rng = random.Random(seed)
    shown = [picture(rng.randrange(4)) for _ in range(seed % 3)]
    parts = [*shown, f"{seed} {QUESTIONS[seed % 4]}"]
    options.setdefault("max_new_tokens", rng.randrange(1, 30))
    return pipeline.prepare([Message("user", parts)], **options)


def test_interleaved_answers_equal_those_alone(server, alone, picture):
    arrived = []

    async def client(job, seed):
        events = []
        async for event in job.events():
            events.append(event)
            arrived.append(seed)
        return events[:-1], events[-1]

    async def main(scheduler):
        await scheduler.loaded()
        pipeline = scheduler.pipeline("m0")
        turns = [turn(pipeline, seed, picture) for seed in range(20)]
        jobs = [scheduler.submit("m0", one) for one in turns]
        assert scheduler.active == 4
        answers = await asyncio.gather(*(client(job, seed) for seed, job in enumerate(jobs)))
        for seed, (pieces, result) in enumerate(answers):
            expected = alone.answer(turn(alone, seed, picture)).result
            assert "".join(pieces) == result.text == expected.text
            assert result.token_ids == expected.token_ids
            assert result.keep_indices == expected.keep_indices
            assert result.finish_reason == expected.finish_reason

    with server(max_active=4, max_queue=20) as scheduler:
        in_loop(main(scheduler))
        assert 'visprune_picture_cache_hits_total{model="m0"}' in scheduler._metrics.render()[0].decode()
    changes = sum(one != other for one, other in pairwise(arrived))
    assert changes > len(arrived) / 2  # pieces of different answers came in turn


def test_a_continued_conversation_is_counted_as_cached(server):
    async def main(scheduler):
        await scheduler.loaded()
        pipeline = scheduler.pipeline("m0")
        first = [Message("user", "What is it?")]
        _, result = await answered(scheduler.submit("m0", pipeline.prepare(first, max_new_tokens=5)))
        second = [*first, Message("assistant", result.text), Message("user", "Why?")]
        _, more = await answered(scheduler.submit("m0", pipeline.prepare(second, max_new_tokens=5)))
        assert more.tokens_cached >= result.tokens_in - 1  # an answer begins otherwise in this template
        await until(lambda: not scheduler.active)
        text = scheduler._metrics.render()[0].decode()
        assert f'visprune_prompt_tokens_cached_total{{model="m0"}} {float(more.tokens_cached)}' in text
        assert 'visprune_prefix_cache_hits_total{model="m0"} 1.0' in text
        assert 'visprune_prefix_cache_misses_total{model="m0"} 1.0' in text

    with server() as scheduler:
        in_loop(main(scheduler))


def test_cancelling_in_the_middle_frees_the_memory(tiny_bundle, picture, monkeypatch):
    go, sent, compute = threading.Event(), [], Stream.step

    def step(stream):
        """Compute a token. Once there was text, wait, so that the answer stays in its middle."""
        piece = compute(stream)
        assert not any(sent) or go.wait(DEADLINE)
        sent.append(piece)
        return piece

    async def main(scheduler):
        await scheduler.loaded()
        monkeypatch.setattr(Stream, "step", step)
        pipeline = scheduler.pipeline("m0")
        others = {id(one) for one in gc.get_objects() if type(one) is KVCache}  # of other tests
        job = scheduler.submit("m0", turn(pipeline, 2, picture, max_new_tokens=200))
        events = job.events()
        await anext(events)
        caches = [
            weakref.ref(one) for one in gc.get_objects() if type(one) is KVCache and id(one) not in others
        ]
        gone = [weakref.ref(job), weakref.ref(job._stream), *caches]
        assert caches
        await events.aclose()
        assert scheduler.active == 1
        go.set()
        await until(lambda: not scheduler.active)
        del events, job
        await asyncio.sleep(0)
        gc.collect()
        assert not any(ref() for ref in gone)

    with serving(load(tiny_bundle, threads=1)) as scheduler:  # no caches, which would keep what was computed
        in_loop(main(scheduler))


def test_fifty_clients_that_go_away_at_random_leave_nothing(server, alone, picture):
    rng = random.Random(1)
    expected = {}

    async def client(scheduler, seed):
        pipeline = scheduler.pipeline("m0")
        job = scheduler.submit("m0", turn(pipeline, seed, picture))
        leave, seen = rng.choice([None, 1, 2, 7]), 0
        async with job:
            async for event in job.events():
                if not isinstance(event, str):
                    expected[seed] = event.token_ids
                    return
                seen += 1
                if seen == leave:
                    return

    async def main(scheduler):
        await scheduler.loaded()
        await asyncio.gather(*(client(scheduler, seed) for seed in range(50)))
        await until(lambda: not scheduler.active)
        assert scheduler.queued == 0

    with server(max_queue=50) as scheduler:
        in_loop(main(scheduler))
    assert 10 < len(expected) < 50
    for seed, ids in expected.items():
        assert alone.answer(turn(alone, seed, picture)).result.token_ids == ids


def test_what_is_measured_bounds_the_conversations(server):
    async def main(scheduler):
        await scheduler.loaded()
        assert scheduler.memory.resident
        assert scheduler.memory.caches == 300_000
        pipeline = scheduler.pipeline("m0")
        made = pipeline.prepare([Message("user", "What is it?")], max_new_tokens=10**6)
        bytes_at_the_context = 2 * pipeline.cache_bytes(pipeline.manifest.decoder.context_limit)
        with pytest.raises(Refusal, match="256 tokens"):
            scheduler.submit("m0", made)
        assert bytes_at_the_context > 40_000
        small = pipeline.prepare([Message("user", "What is it?")], max_new_tokens=2)
        await answered(scheduler.submit("m0", small))

    with server(memory=30_000) as scheduler:
        in_loop(main(scheduler))


def test_two_models_answer_interleaved_what_they_answer_alone(demo_bundle, tiny_bundle):
    shown = [scene(seed) for seed in range(3)]
    asked = [(one.image, q.text) for one in shown for q in questions(one.things, np.random.default_rng(0))]

    def prepared(pipeline, number):
        image, text = asked[number % len(asked)]
        sampling = Sampling(temperature=0.8, seed=number) if number % 2 else Sampling()
        ratio = (0.11, 0.5, 1.0)[number % 3]
        return pipeline.prepare([Message("user", [image, text])], sampling=sampling, ratio=ratio)

    async def main(scheduler):
        await scheduler.loaded()
        jobs = [scheduler.submit("m0", prepared(scheduler.pipeline("m0"), n)) for n in range(12)]
        other = scheduler.pipeline("m1").prepare([Message("user", "What is it?")], max_new_tokens=20)
        jobs.append(scheduler.submit("m1", other))
        return [result for _, result in await asyncio.gather(*map(answered, jobs))]

    pipelines = [
        load(demo_bundle, threads=1, picture_cache=10**6, prefix_cache=10**6),
        load(tiny_bundle, threads=1),
    ]
    with serving(*pipelines) as scheduler:
        found = in_loop(main(scheduler))
    with load(demo_bundle, threads=1) as alone:
        expected = [alone.answer(prepared(alone, number)).result for number in range(12)]
    assert [one.token_ids for one in found[:-1]] == [one.token_ids for one in expected]
    assert [one.keep_indices for one in found[:-1]] == [one.keep_indices for one in expected]
    assert len({one.text for one in expected}) > 3
    assert len(found[-1].token_ids) == 20
