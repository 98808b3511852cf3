"""Intervals hold what they promise, on data of known truth."""

from __future__ import annotations

import numpy as np
import pytest

from visprune.evaluation.intervals import bootstrap, paired, wilson


def test_wilson_solves_its_equation():
    """Its ends are the proportions at which the observed one is 1.96 standard errors away."""
    for right, of in [(0, 10), (7, 10), (40, 40), (481, 1000)]:
        for end in wilson(right, of):
            assert abs(right / of - end) == pytest.approx(1.96 * np.sqrt(end * (1 - end) / of), abs=1e-9)


@pytest.mark.parametrize(("of", "gain", "loss"), [(40, 0.1, 0.05), (100, 0.02, 0.1), (400, 0.05, 0.05)])
def test_the_paired_interval_covers_the_truth(of, gain, loss):
    drawn = np.random.default_rng(0).multinomial(of, [gain, loss, 1 - gain - loss], size=4000)
    ends = np.array([paired(gained, lost, of) for gained, lost, _ in drawn])
    covered = ((ends[:, 0] <= gain - loss) & (gain - loss <= ends[:, 1])).mean()
    assert 0.93 < covered < 0.99


def test_a_bundle_against_itself_is_no_difference():
    low, high = paired(0, 0, 40)
    assert low < 0 < high
    assert low == -high


def test_bootstrap_is_the_normal_interval_of_many():
    scores = [0.0] * 300 + [0.3] * 100 + [1.0] * 600

    def means(kinds, drawn):
        return drawn @ np.array(kinds) / drawn.sum(axis=1)

    half = 1.96 * np.std(scores) / np.sqrt(len(scores))
    low, high = bootstrap(scores, means)
    assert (low, high) == pytest.approx((np.mean(scores) - half, np.mean(scores) + half), abs=2e-3)
    assert bootstrap(scores, means) == (low, high)
