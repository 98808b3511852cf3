"""From a ratio to a count: exact where arithmetic is not, never above the budget, never below one unit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from visprune.budget import Budget
from visprune.errors import UsageError

TOKENS = Budget(576)
ROWS = Budget(576, unit="row", unit_tokens=24)


@pytest.mark.parametrize(
    ("budget", "ratio", "kept"),
    [
        (TOKENS, 0.25, 144),
        (TOKENS, 1.0, 576),
        (TOKENS, 1, 576),
        (TOKENS, 1e-300, 1),
        (TOKENS, math.ulp(0.0), 1),
        (TOKENS, 0.001, 1),
        (TOKENS, 0.999, 575),
        (TOKENS, math.nextafter(1.0, 0.0), 576),  # one rounding error below 1 is 1
        (Budget(100), 0.29, 29),  # 100 * 0.29 is 28.999...
        (Budget(1000), 0.019, 19),
        (Budget(1), 0.5, 1),
        (ROWS, 0.25, 144),
        (ROWS, 0.26, 144),
        (ROWS, 0.01, 24),
        (ROWS, 1.0, 576),
        (Budget(144, unit="row", unit_tokens=12), 0.25, 36),
        (Budget(576, minimum=10), 0.01, 10),
    ],
)
def test_from_ratio(budget, ratio, kept):
    assert budget.from_ratio(ratio) == kept


@pytest.mark.parametrize("tokens", [100, 144, 576, 729, 2880])
def test_a_percentage_gives_the_floor_of_exact_arithmetic(tokens):
    for percent in range(1, 101):
        exact = max(1, math.floor(Fraction(percent, 100) * tokens))
        assert Budget(tokens).from_ratio(percent / 100) == exact


@pytest.mark.parametrize("ratio", [0.0, -0.0, -0.25, 1.0000001, 2, 25, math.nan, math.inf, -math.inf])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(UsageError, match=r"outside \(0, 1\]") as caught:
        TOKENS.from_ratio(ratio)
    assert "0.25" in caught.value.hint


@pytest.mark.parametrize(
    ("budget", "count"), [(TOKENS, 1), (TOKENS, 576), (ROWS, 24), (ROWS, 552), (ROWS, 576)]
)
def test_from_tokens_takes_a_count_that_can_be_reached(budget, count):
    assert budget.from_tokens(count) == count


@pytest.mark.parametrize("count", [0, -1, 577, 10**12])
def test_a_count_outside_the_image_is_refused(count):
    with pytest.raises(UsageError, match=f"Cannot keep {count} of 576") as caught:
        TOKENS.from_tokens(count)
    assert caught.value.hint == "Give a count from 1 to 576."


def test_a_count_below_the_minimum_is_refused():
    with pytest.raises(UsageError, match="Cannot keep 9 of 576"):
        Budget(576, minimum=10).from_tokens(9)


def test_a_count_between_rows_names_the_neighbours():
    with pytest.raises(UsageError, match="whole rows of 24 tokens") as caught:
        ROWS.from_tokens(100)
    assert caught.value.hint == "Keep 96 or 120 tokens."


def test_a_row_method_names_its_smallest_count():
    with pytest.raises(UsageError) as caught:
        ROWS.from_tokens(5)
    assert caught.value.hint == "Give a count from 24 to 576."


def test_a_method_that_keeps_everything_takes_only_everything():
    keep_all = Budget(576, prunable=False)
    assert keep_all.from_ratio(1.0) == keep_all.from_tokens(576) == 576
    with pytest.raises(UsageError, match="keeps all 576"):
        keep_all.from_ratio(0.25)
    with pytest.raises(UsageError, match="cannot keep 144"):
        keep_all.from_tokens(144)


@pytest.mark.parametrize(
    ("tokens", "kept", "sentence"),
    [
        (576, 144, "kept 144 of 576 visual tokens, 75% removed"),
        (144, 36, "kept 36 of 144 visual tokens, 75% removed"),
        (576, 576, "kept 576 of 576 visual tokens, 0% removed"),
        (576, 1, "kept 1 of 576 visual tokens, 99.83% removed"),
        (3, 1, "kept 1 of 3 visual tokens, 66.67% removed"),
    ],
)
def test_describe(tokens, kept, sentence):
    assert Budget(tokens).describe(kept) == sentence


@pytest.mark.parametrize(
    "numbers",
    [
        {"visual_tokens": 0},
        {"visual_tokens": -576},
        {"visual_tokens": 576, "unit_tokens": 0},
        {"visual_tokens": 576, "unit_tokens": -24},
        {"visual_tokens": 577, "unit_tokens": 24},
        {"visual_tokens": 576, "minimum": 0},
        {"visual_tokens": 576, "minimum": 577},
        {"visual_tokens": 576, "unit_tokens": 24, "minimum": 25},
    ],
)
def test_numbers_that_describe_no_budget_are_refused(numbers):
    with pytest.raises(UsageError, match="cannot be counted"):
        Budget(**numbers)
