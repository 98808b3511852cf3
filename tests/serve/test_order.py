"""The order of tokens, by its rule."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from visprune.serve.order import Order


def turns(order: Order[str], count: int) -> str:
    return "".join(order.next() for _ in range(count))


def test_first_tokens_go_in_the_order_of_arrival_and_those_that_decode_get_one_between_them():
    order: Order[str] = Order()
    for name in "abcd":
        order.add(name)
    assert turns(order, 2) == "ab"  # when a's began, nobody was decoding
    assert turns(order, 2) == "ac"  # when b's began, a was
    assert turns(order, 3) == "bad"
    assert turns(order, 8) == "cbadcbad"


def test_a_new_conversation_goes_first_at_once_if_the_others_had_their_tokens():
    order: Order[str] = Order()
    order.add("a")
    order.add("b")
    assert turns(order, 5) == "ababa"
    order.add("c")
    assert turns(order, 6) == "cbacba"


def test_a_flood_of_new_conversations_does_not_starve_one_that_decodes():
    order: Order[str] = Order()
    order.add("a")
    assert order.next() == "a"
    seen = []
    for name in "bcdefgh":
        order.add(name)
        seen.append(turns(order, 2))
        order.remove(name)  # its answer has one token
    assert seen == ["ba", "ca", "da", "ea", "fa", "ga", "ha"]


def test_one_that_leaves_before_its_turn_holds_nobody_up():
    order: Order[str] = Order()
    for name in "abc":
        order.add(name)
    assert turns(order, 2) == "ab"  # now a computes one before c's first
    order.remove("a")
    assert turns(order, 4) == "cbcb"
    order.remove("b")
    order.remove("c")
    assert len(order) == 0
    assert list(order) == []


def test_one_that_never_computed_can_leave():
    order: Order[str] = Order()
    order.add("a")
    order.add("b")
    order.remove("a")
    assert turns(order, 2) == "bb"


@pytest.mark.parametrize("seed", range(20))
def test_a_running_answer_waits_for_one_prefill_and_one_token_of_each_other(seed):
    rng = random.Random(seed)
    order: Order[int] = Order()
    passed: dict[
        int, list[tuple[int, bool]]
    ] = {}  # by running answer: who computed since, and whether a prefill
    waits = 0
    for new in range(1000):
        if len(order) < 5 and rng.random() < 0.5:
            order.add(new)
        if len(order) > 1 and rng.random() < 0.2:
            gone = rng.choice(list(order))
            order.remove(gone)
            passed.pop(gone, None)
        if not len(order):
            continue
        now = order.next()
        prefill = now not in passed
        if not prefill:
            waits += 1
            assert sum(first for _, first in passed[now]) <= 1
            assert max(Counter(other for other, _ in passed[now]).values(), default=0) <= 1
        for seen in passed.values():
            seen.append((now, prefill))
        passed[now] = []
    assert waits > 300
