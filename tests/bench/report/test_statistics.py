"""Intervals cover what they should, equal rows are not told apart, and drift does not matter."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from visprune.bench.report import statistics
from visprune.bench.report.statistics import FLOOR, Difference, Summary, difference

SIMULATIONS = 2000


def pairs(rng, rounds, ratio=1.0, noise=0.05, drift=0.0):
    """Times of two rows: log-normal noise of their own, and a drift that both share."""
    shared = np.exp(drift * np.cumsum(rng.standard_normal(rounds)))
    own = np.exp(noise * rng.standard_normal((2, rounds)))
    return 10 * ratio * shared * own[0], 10 * shared * own[1]


@pytest.mark.parametrize("rounds", [2, 5, 10, 13])
def test_the_null_distribution_is_that_of_all_signs(rounds):
    counts = np.zeros(rounds * (rounds + 1) // 2 + 1)
    for signs in itertools.product((0, 1), repeat=rounds):
        counts[sum(rank for rank, sign in zip(range(1, rounds + 1), signs, strict=True) if sign)] += 1
    np.testing.assert_allclose(statistics._signed_rank(rounds), counts / 2**rounds, rtol=0, atol=1e-15)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("rounds", [10, 20])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(rounds, ratio):
    rng = np.random.default_rng(0)
    found = [difference(*pairs(rng, rounds, ratio)) for _ in range(SIMULATIONS)]
    covered = np.mean([one.low <= ratio <= one.high for one in found])
    assert covered >= 0.985  # 99%, less four standard errors
    assert np.median([one.ratio for one in found]) == pytest.approx(ratio, rel=0.005)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_equal_rows_are_told_apart_in_fewer_than_one_of_a_hundred_runs(drift):
    rng = np.random.default_rng(1)
    told = [difference(*pairs(rng, 10, drift=drift)).told for _ in range(SIMULATIONS)]
    assert np.mean(told) < 0.012


def test_a_row_is_told_from_one_that_takes_a_fifth_longer_although_the_machine_drifts_by_far_more():
    rng = np.random.default_rng(2)
    found = [difference(*pairs(rng, 10, 1.2, 0.05, drift=0.3)) for _ in range(SIMULATIONS)]
    assert np.mean([one.told for one in found]) > 0.97


def test_two_outliers_of_ten_rounds_make_no_difference():
    rng = np.random.default_rng(3)
    times, others = pairs(rng, 10, noise=0.01)
    times[3] *= 5
    times[7] *= 8
    assert not difference(times, others).told


def test_a_row_by_itself_is_no_difference():
    times = np.random.default_rng(4).lognormal(size=10)
    found = difference(times, times)
    assert (found.ratio, found.low, found.high, found.told) == (1.0, 1.0, 1.0, False)


def test_a_difference_below_the_floor_is_none_however_sure():
    times = np.full(50, 10.0)
    assert not difference(times * (1 + FLOOR / 2), times).told
    assert difference(times * (1 + 2 * FLOOR), times).told


@pytest.mark.parametrize("rounds", [2, 7])
def test_too_few_rounds_have_no_interval(rounds):
    found = difference(np.full(rounds, 20.0), np.full(rounds, 10.0))
    assert (found.ratio, found.low, found.high, found.told) == (pytest.approx(2.0), None, None, False)


def test_eight_rounds_are_the_least_for_ninety_nine_percent():
    assert difference(np.full(8, 20.0), np.full(8, 10.0)).told


def test_the_interval_is_that_of_the_walsh_averages():
    times = np.exp(np.arange(10.0)) * 3
    found = difference(times, np.full(10, 3.0))
    walsh = sorted((i + j) / 2 for i in range(10) for j in range(i, 10))
    # P(T <= 3) = 5 / 1024 is the last that is at most 0.005, so three of each end are left out.
    assert math.log(found.low) == pytest.approx(walsh[3])
    assert math.log(found.high) == pytest.approx(walsh[-4])
    assert math.log(found.ratio) == pytest.approx(4.5)


def test_the_inverse_is_that_of_the_swapped_rows():
    times, others = pairs(np.random.default_rng(5), 12, 1.4)
    there, back = difference(times, others).inverse(), difference(others, times)
    assert (there.ratio, there.low, there.high) == pytest.approx((back.ratio, back.low, back.high))
    assert Difference(2.0, None, None).inverse() == Difference(0.5, None, None)


def test_two_runs_agree_within_the_spread_that_they_print():
    rng = np.random.default_rng(6)
    agree = []
    for _ in range(SIMULATIONS):
        one, other = (Summary.of(10 * np.exp(0.1 * rng.standard_normal(10))) for _ in range(2))
        agree.append(abs(one.median - other.median) <= max(one.p90 - one.p10, other.p90 - other.p10))
    assert np.mean(agree) > 0.99


def test_a_summary_is_numpys():
    values = np.random.default_rng(7).lognormal(size=11)
    found = Summary.of(values)
    assert (found.p10, found.median, found.p90) == pytest.approx(tuple(np.quantile(values, (0.1, 0.5, 0.9))))
    assert found.spread == pytest.approx((found.p90 - found.p10) / found.median)
    assert Summary.of([0.0]).spread == 0.0
