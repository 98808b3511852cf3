"""Figures of an evaluation with their 95% intervals, from judged answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visprune.evaluation.answer_text import plain
from visprune.evaluation.intervals import bootstrap, paired, wilson
from visprune.evaluation.metrics import Judgement, Metric
from visprune.evaluation.questions import Question

__all__ = ["Figure", "Judgements", "agreement", "difference", "figures_of"]

Judgements = Mapping[str, Judgement]
"""The judgement of each answer, by the key of its question."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A share between 0 and 1, or a difference of two, with its interval.

    Attributes:
        name: Name of the figure.
        value: The share or the difference.
        low: Lower end of its 95% interval.
        high: Upper end of its 95% interval.
        interval: Method by which the interval was computed; see `intervals`.
    """

    name: str
    value: float
    low: float
    high: float
    interval: Literal["wilson", "bonett-price", "bootstrap"]


def figures_of(metric: Metric, usable: Sequence[Question], judged: Judgements) -> tuple[Figure, ...]:
    """Return the figures of one bundle; the first is the main one.

    Args:
        metric: The metric that judged the answers.
        usable: The questions that were answered.
        judged: Their judgements.
    """
    main = _mean(metric, [judged[question.key].score for question in usable])
    return (main, *(_yes_no_figures(usable, judged) if metric.name == "yes-no" else ()))


def difference(metric: Metric, judged: Judgements, others: Judgements) -> Figure | None:
    """Return the mean score of one bundle minus that of another, over the questions that both answered.

    None if there is no such question.
    """
    changes = [judged[key].score - others[key].score for key in judged if key in others]
    if not changes:
        return None
    mean = float(np.mean(changes))
    if metric.binary:
        ends = paired(changes.count(1.0), changes.count(-1.0), len(changes))
        return Figure("difference", mean, *ends, "bonett-price")
    ends = bootstrap([round(change, 6) for change in changes], _means)
    return Figure("difference", mean, *ends, "bootstrap")


def agreement(judged: Judgements, others: Judgements) -> Figure | None:
    """Return the share of questions that two bundles answered alike, of those that both answered.

    None if there is no such question.
    """
    same = [judged[key].said == others[key].said for key in judged if key in others]
    return _share("agreement", sum(same), len(same)) if same else None


def _mean(metric: Metric, scores: Sequence[float]) -> Figure:
    if metric.binary:
        return _share(metric.title, int(sum(scores)), len(scores))
    return Figure(
        metric.title, float(np.mean(scores)), *bootstrap([round(s, 6) for s in scores], _means), "bootstrap"
    )


def _share(name: str, right: int, of: int) -> Figure:
    return Figure(name, right / of, *wilson(right, of), "wilson")


def _means(kinds: list[float], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    means: NDArray[np.float64] = drawn @ np.array(kinds) / drawn.sum(axis=1)
    return means


def _yes_no_figures(usable: Sequence[Question], judged: Judgements) -> list[Figure]:
    """Return precision, recall and F1 of "yes", and the share of "yes" (Li et al., POPE, EMNLP 2023)."""
    pairs = [(plain(question.answers[0]), judged[question.key].said) for question in usable]
    hit, false, missed = (pairs.count(pair) for pair in (("yes", "yes"), ("no", "yes"), ("yes", "no")))
    figures = []
    if hit + false:
        figures.append(_share("precision", hit, hit + false))
    if hit + missed:
        figures.append(_share("recall", hit, hit + missed))
    if hit + false + missed:
        value = 2 * hit / (2 * hit + false + missed)
        figures.append(Figure("F1", value, *bootstrap(pairs, _f1), "bootstrap"))
    return [*figures, _share("yes ratio", hit + false, len(pairs))]


def _f1(kinds: list[tuple[str, str]], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    hits = drawn @ np.array([kind == ("yes", "yes") for kind in kinds], dtype=np.int64)
    wrong = drawn @ np.array([kind[0] != kind[1] for kind in kinds], dtype=np.int64)
    f1: NDArray[np.float64] = 2 * hits / np.maximum(1, 2 * hits + wrong)
    return f1
