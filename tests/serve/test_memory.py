"""Measured memory, and what a conversation needs of it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
from scripted_models import Script, ScriptedPipeline

from visprune.errors import InputError, UnsupportedError
from visprune.serve import memory
from visprune.serve.memory import FRACTION, MemoryPlan, longest, memory_needed, resident_memory, warm_up


def with_caches(pictures: int, prefixes: int) -> SimpleNamespace:
    caches = SimpleNamespace(
        pictures=SimpleNamespace(limit=pictures), prefixes=SimpleNamespace(limit=prefixes)
    )
    return SimpleNamespace(caches=caches)


def test_the_memory_of_the_process_is_what_the_system_says():
    before = resident_memory()
    if before is None:
        pytest.skip("this system does not say")
    block = np.ones(64_000_000, dtype=np.uint8)  # 64 MB that were written
    after = resident_memory()
    assert after - before == pytest.approx(len(block), rel=0.2)
    pages = int(open("/proc/self/statm").read().split()[1])  # noqa: PTH123, SIM115
    assert after == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.1)


def test_conversations_may_take_a_fraction_of_what_is_left_without_the_caches(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    pipelines = [with_caches(100, 20), with_caches(3, 0)]
    plan = MemoryPlan.measure(None, pipelines)
    assert (plan.left, plan.caches, plan.conversations) == (1000, 123, int(FRACTION * 1000) - 123)
    assert "1 kB are left, caches may take 123 B, conversations may take 627 B." in str(plan)


def test_caches_leave_conversations_at_least_half(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    pipelines = [with_caches(600, 200), with_caches(0, 200)]
    plan = MemoryPlan.measure(None, pipelines)
    assert (plan.caches, plan.conversations) == (375, 375)
    assert [(p.caches.pictures.limit, p.caches.prefixes.limit) for p in pipelines] == [(225, 75), (0, 75)]


def test_a_bound_of_the_user_stands():
    assert MemoryPlan.measure(77, [with_caches(900, 0)]).conversations == 77


def test_a_system_that_does_not_say_gives_no_bound(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    monkeypatch.setattr(memory, "resident_memory", lambda: None)
    plan = MemoryPlan.measure(None, [with_caches(100, 0)])
    assert plan.conversations is None
    assert str(plan) == "Memory: caches may take 100 B, conversations have no bound."


def test_a_conversation_needs_its_keys_and_values_twice_up_to_the_context():
    pipeline = ScriptedPipeline()  # one byte a token, a context of 1000
    assert longest(pipeline, Script("a", tokens_in=10, max_new_tokens=20)) == 30
    assert longest(pipeline, Script("a", tokens_in=990, max_new_tokens=20)) == 1000
    assert memory_needed(pipeline, 30) == 60


class Fussy(ScriptedPipeline):
    """Takes messages without a picture only, or none at all."""

    texts = True

    def prepare(self, messages, max_new_tokens):
        shown = messages[0].images > 0
        self.log.append("picture" if shown else "text")
        if shown or not self.texts:
            raise InputError("It is too long.", "Shorten it.")
        return super().prepare(messages, max_new_tokens)


def test_a_model_without_pictures_is_warmed_up_with_text():
    pipeline = Fussy()
    warm_up(pipeline)
    assert pipeline.log == ["picture", "text", "warm-up"]


def test_a_model_that_refuses_both_is_not_warmed_up():
    pipeline = Fussy()
    pipeline.texts = False
    warm_up(pipeline)
    assert pipeline.log == ["picture", "text"]


def test_memory_for_not_even_one_conversation_is_refused():
    plan = MemoryPlan(None, None, 0, 1000)
    plan.check(1000)
    with pytest.raises(UnsupportedError, match=r"may take 1 kB of memory, and a short one needs 4\.8 MB"):
        plan.check(4_800_000)
    MemoryPlan(None, None, 0, None).check(1 << 50)
