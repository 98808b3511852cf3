"""Ratios become counts: exact despite rounding errors, never above the budget, never below one unit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from visprune.budget import Budget, LayerBudget
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


class TestInsideTheLlm:
    HALF = LayerBudget(1, 0.5, rounding="nearest")
    PYRAMID = LayerBudget(3, 0.125)
    RECIPE = LayerBudget(3, 0.4, deletions=(100, 200, 76), recipe_tokens=576)

    @pytest.mark.parametrize(
        ("budget", "tokens", "kept"),
        [
            (HALF, 576, (288,)),
            (HALF, 577, (289,)),  # round(N r), halves up
            (HALF, 1, (1,)),
            (LayerBudget(1, 0.25, rounding="nearest"), 10, (3,)),
            (LayerBudget(1, 0.25, rounding="nearest"), 9, (2,)),
            (LayerBudget(1, 0.01, rounding="nearest"), 10, (1,)),  # never none
            (LayerBudget(1, 1.0, rounding="nearest"), 576, (576,)),
            (PYRAMID, 576, (288, 144, 72)),
            (PYRAMID, 2880, (1440, 720, 360)),
            (PYRAMID, 575, (287, 143, 71)),
            (PYRAMID, 1, (1, 1, 1)),
            (LayerBudget(2, 0.25), 36, (18, 9)),
            (LayerBudget(2, 0.09), 100, (30, 9)),  # 0.09 ** 0.5 is 0.3, and 100 * 0.3 is whole
            (LayerBudget(1, 0.29), 100, (29,)),
            (LayerBudget(3, 1e-9), 50, (1, 1, 1)),
            (RECIPE, 576, (476, 276, 200)),
            (RECIPE, 1152, (952, 552, 400)),
            (RECIPE, 288, (238, 138, 100)),
            (RECIPE, 10, (9, 5, 4)),  # deletions are rounded down, as their sum
            (RECIPE, 1, (1, 1, 1)),
            (LayerBudget(2, 0.1, deletions=(0, 575), recipe_tokens=576), 100, (100, 1)),
        ],
    )
    def test_kept(self, budget, tokens, kept):
        assert budget.kept(tokens) == kept

    def test_counts_never_rise_with_depth_and_never_reach_zero(self):
        for budget in (self.HALF, self.PYRAMID, self.RECIPE, LayerBudget(7, 0.2)):
            for tokens in range(1, 700, 7):
                counts = (tokens, *budget.kept(tokens))
                assert list(counts) == sorted(counts, reverse=True)
                assert counts[-1] >= 1

    def test_another_ratio(self):
        assert self.HALF.kept(576, 0.25) == (144,)
        assert self.PYRAMID.kept(1000, 0.001) == (100, 10, 1)
        assert self.PYRAMID.kept(576, 1.0) == (576, 576, 576)

    @pytest.mark.parametrize("ratio", [0.0, -1.0, 1.01, math.nan, math.inf])
    def test_a_ratio_that_cannot_be(self, ratio):
        with pytest.raises(UsageError, match="outside"):
            self.PYRAMID.kept(576, ratio)
        with pytest.raises(UsageError, match="outside"):
            LayerBudget(1, ratio)

    @pytest.mark.parametrize("ratio", [0.4, 1.0, 0.0])
    def test_a_recipe_has_no_other_ratio(self, ratio):
        assert self.RECIPE.is_recipe
        assert not self.PYRAMID.is_recipe
        with pytest.raises(UsageError, match="A recipe fixes") as caught:
            self.RECIPE.kept(576, ratio)
        assert "visprune fit" in caught.value.hint

    @pytest.mark.parametrize(
        ("numbers", "what"),
        [
            ({"points": 0}, "no layer to prune at"),
            ({"points": -1}, "no layer to prune at"),
            ({"deletions": (1, 2)}, "2 deletions do not fit 1 prune points"),
            ({"deletions": ()}, "0 deletions do not fit 1"),
            ({"deletions": (-1,)}, "do not fit"),
            ({"deletions": (576,)}, "deletes 576 of 576"),
            ({"deletions": (600,)}, "one at least must be left"),
            ({"deletions": (5,), "recipe_tokens": 0}, "deletes 5 of 0"),
            ({"deletions": (5,), "recipe_tokens": -1}, "deletes 5 of -1"),
        ],
    )
    def test_numbers_that_describe_none(self, numbers, what):
        with pytest.raises(UsageError, match=what):
            LayerBudget(**({"points": 1, "ratio": 0.5, "recipe_tokens": 576} | numbers))
