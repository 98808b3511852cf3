"""The figures of an evaluation, each with its 95% interval, and of each bundle against one of them."""

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
    """A number between 0 and 1, or a difference of two.

    Attributes:
        name: What it is.
        value: It.
        low: Lower end of its 95% interval.
        high: Upper end.
        interval: How that was found: see `intervals`.
    """

    name: str
    value: float
    low: float
    high: float
    interval: Literal["wilson", "bonett-price", "bootstrap"]


@dataclass(frozen=True, slots=True)
class EvaluatedBundle:
    """A bundle that was asked.

    Attributes:
        name: As the user gave it, with its ratio.
        model: What it was made of.
        unpruned: Whether it keeps every visual token.
    """

    name: str
    model: str
    unpruned: bool


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One bundle.

    Attributes:
        asked: The bundle.
        questions: Those it answered; the figures are of them.
        kept: Share of visual tokens kept, over all of them.
        figures: By the metric; the first is its main one.
        difference: Of the first figure, this bundle's less the baseline's, of questions that both answered.
        agreement: Share of these that both answered alike, right or wrong. Both are None for the baseline.
        cut: Answers that the limit of tokens ended.
        errors: For each question that could not be asked, its place and why.
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
    """All of it.

    Attributes:
        data: Name of what was asked.
        metric: Name of what judged.
        questions: That could be used.
        skipped: A sentence for each that could not.
        baseline: Name of the bundle that the others are compared with: the first unpruned one, or the first.
        rows: One for each bundle, in order.
        notes: What a reader must know of the comparison.
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
    """Judge the answers of each bundle, which are by the questions' keys.

    Raises:
        InputError: A bundle could not be asked anything.
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
            f"{asked.name} could be asked nothing. {first.where}: {answers[first.key].error}",
            "See that pictures can be read, and that prompts are not longer than the model's context.",
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
    figures = [_mean(metric, scores), *(_of_yes_and_no(usable, judged) if metric.name == "yes-no" else ())]
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


def _of_yes_and_no(usable: Sequence[Question], judged: Judgements) -> list[Figure]:
    """Precision, recall and F1 of "yes", and how often it was said (Li et al., POPE, EMNLP 2023)."""
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
            f"These bundles are of {len(models)} models ({', '.join(models)}): "
            "a difference between two of these is not of pruning or precision alone."
        )
    if len(asked) > 1 and not asked[first].unpruned:
        notes.append(
            f"No bundle here is unpruned, so {asked[first].name} is what the others are compared with; "
            f"DIR@1 is a bundle with every visual token."
        )
    return tuple(notes)
