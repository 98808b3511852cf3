"""The figures of an evaluation with their 95% intervals, and each bundle compared with a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visprune.errors import InputError
from visprune.evaluation.answer_text import plain
from visprune.evaluation.answering import Answer
from visprune.evaluation.intervals import bootstrap, paired, wilson
from visprune.evaluation.metrics import Judgement, Metric, metric_named
from visprune.evaluation.questions import Question, Questions

__all__ = ["EvaluatedBundle", "Evaluation", "EvaluationRow", "Figure", "summarise"]


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


@dataclass(frozen=True, slots=True)
class EvaluatedBundle:
    """A bundle that was asked the questions.

    Attributes:
        name: The name that the user gave, with the ratio.
        model: Name of the model that it was exported from.
        unpruned: Whether it keeps every visual token.
    """

    name: str
    model: str
    unpruned: bool


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """The results of one bundle.

    Attributes:
        asked: The bundle.
        questions: Number of questions that it answered; the figures are over these.
        kept: Share of visual tokens kept, over all questions.
        figures: Figures of the metric; the first is the main one.
        difference: The first figure of this bundle minus that of the baseline, over the questions that both
            answered. None for the baseline.
        agreement: Share of these questions that both answered alike, right or wrong. None for the baseline.
        cut: Number of answers that the limit of new tokens cut off.
        errors: For each question that could not be asked, its place and the reason.
    """

    asked: EvaluatedBundle
    questions: int
    kept: float
    figures: tuple[Figure, ...]
    difference: Figure | None
    agreement: Figure | None
    cut: int
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of all bundles.

    Attributes:
        data: Name of the data.
        metric: Name of the metric.
        questions: Number of questions that could be used.
        skipped: A sentence for each question that could not.
        baseline: Name of the bundle that the others are compared with: the first unpruned one, or the first.
        rows: One for each bundle, in order.
        notes: Sentences that a reader of the comparison must know.
    """

    data: str
    metric: str
    questions: int
    skipped: tuple[str, ...]
    baseline: str
    rows: tuple[EvaluationRow, ...]
    notes: tuple[str, ...]


Answers = Mapping[str, Answer]
Judgements = dict[str, Judgement]


def summarise(
    questions: Questions, asked: Sequence[EvaluatedBundle], answers: Sequence[Answers]
) -> Evaluation:
    """Judge the answers of each bundle, and compute the figures.

    Args:
        questions: The questions.
        asked: The bundles.
        answers: For each bundle its answers, by the keys of the questions.

    Raises:
        InputError: A bundle could not be asked any question.
    """
    metric = metric_named(questions.metric)
    judged = [_judged(questions, metric, one, found) for one, found in zip(asked, answers, strict=True)]
    first = next((i for i, one in enumerate(asked) if one.unpruned), 0)
    rows = [
        _row(questions, metric, one, found, mine, None if index == first else judged[first])
        for index, (one, found, mine) in enumerate(zip(asked, answers, judged, strict=True))
    ]
    return Evaluation(
        questions.name,
        metric.name,
        len(questions.usable),
        questions.skipped,
        asked[first].name,
        tuple(rows),
        _notes(asked, first),
    )


def _judged(questions: Questions, metric: Metric, asked: EvaluatedBundle, answers: Answers) -> Judgements:
    judged = {}
    for question in questions.usable:
        found = answers[question.key]
        if found.error is None:
            judged[question.key] = metric.judge(question, found.text)
    if not judged:
        first = questions.usable[0]
        raise InputError(
            f"{asked.name} could not be asked any question. {first.where}: {answers[first.key].error}",
            "Check that the images can be read, and that prompts fit into the model's context.",
        )
    return judged


def _row(
    questions: Questions,
    metric: Metric,
    asked: EvaluatedBundle,
    answers: Answers,
    judged: Judgements,
    baseline: Judgements | None,
) -> EvaluationRow:
    usable = [question for question in questions.usable if question.key in judged]
    scores = [judged[question.key].score for question in usable]
    figures = [_mean(metric, scores), *(_yes_no_figures(usable, judged) if metric.name == "yes-no" else ())]
    found = [answers[question.key] for question in usable]
    seen = sum(answer.visual_tokens for answer in found)
    difference, agreement = _compared(metric, judged, baseline) if baseline else (None, None)
    return EvaluationRow(
        asked,
        len(usable),
        sum(answer.tokens_kept for answer in found) / max(1, seen),
        tuple(figures),
        difference,
        agreement,
        sum(answer.finish_reason == "length" for answer in found),
        tuple(f"{q.where}: {answers[q.key].error}" for q in questions.usable if q.key not in judged),
    )


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


def _compared(
    metric: Metric, judged: Judgements, baseline: Judgements
) -> tuple[Figure | None, Figure | None]:
    both = [key for key in judged if key in baseline]
    if not both:
        return None, None
    changes = [judged[key].score - baseline[key].score for key in both]
    mean = float(np.mean(changes))
    if metric.binary:
        ends = paired(changes.count(1.0), changes.count(-1.0), len(changes))
        difference = Figure("difference", mean, *ends, "bonett-price")
    else:
        ends = bootstrap([round(change, 6) for change in changes], _means)
        difference = Figure("difference", mean, *ends, "bootstrap")
    same = sum(judged[key].said == baseline[key].said for key in both)
    return difference, _share("agreement", same, len(both))


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


def _notes(asked: Sequence[EvaluatedBundle], first: int) -> tuple[str, ...]:
    notes = []
    models = list(dict.fromkeys(one.model for one in asked))
    if len(models) > 1:
        notes.append(
            f"These bundles are of {len(models)} models ({', '.join(models)}): a difference between two of "
            "these does not come from pruning or precision alone."
        )
    if len(asked) > 1 and not asked[first].unpruned:
        notes.append(
            f"No bundle here is unpruned, so the others are compared with {asked[first].name}. To compare "
            "with every visual token, name a bundle as DIR@1."
        )
    return tuple(notes)
