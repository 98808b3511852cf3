"""The results of an evaluation: figures of each bundle, compared with the unpruned one and with baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from visprune.errors import InputError
from visprune.evaluation.answering import Answer
from visprune.evaluation.figures import Figure, Judgements, agreement, difference, figures_of
from visprune.evaluation.metrics import Metric, metric_named
from visprune.evaluation.questions import Questions

__all__ = ["EqualCount", "EvaluatedBundle", "Evaluation", "EvaluationRow", "losses", "summarise"]


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
class EqualCount:
    """A bundle compared with a baseline that keeps as many tokens, or gives the LLM as much work.

    Attributes:
        name: Name of the baseline's row.
        difference: The first figure of the bundle minus that of the baseline, over the questions that both
            answered.
        loses: Whether the whole interval of the difference is below 0.
    """

    name: str
    difference: Figure
    loses: bool


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
        equal_counts: Comparisons with baselines that keep as many tokens.
    """

    asked: EvaluatedBundle
    questions: int
    kept: float
    figures: tuple[Figure, ...]
    difference: Figure | None
    agreement: Figure | None
    cut: int
    errors: tuple[str, ...]
    equal_counts: tuple[EqualCount, ...] = ()


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


def summarise(
    questions: Questions,
    asked: Sequence[EvaluatedBundle],
    answers: Sequence[Answers],
    pairs: Sequence[tuple[int, int]] = (),
) -> Evaluation:
    """Judge the answers of each bundle, and compute the figures.

    Args:
        questions: The questions.
        asked: The bundles.
        answers: For each bundle its answers, by the keys of the questions.
        pairs: Positions of a bundle and of a baseline that keeps as many tokens, to compare them too.

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
    for index, other in pairs:
        if (found := difference(metric, judged[index], judged[other])) is not None:
            equal = EqualCount(asked[other].name, found, loses=found.high < 0)
            rows[index] = replace(rows[index], equal_counts=(*rows[index].equal_counts, equal))
    return Evaluation(
        questions.name,
        metric.name,
        len(questions.usable),
        questions.skipped,
        asked[first].name,
        tuple(rows),
        (*_notes(asked, first), *losses(rows)),
    )


def losses(rows: Sequence[EvaluationRow]) -> list[str]:
    """Return a sentence for each bundle that a baseline with as many tokens beats."""
    found = []
    for row in rows:
        for other in row.equal_counts:
            if other.loses:
                by = other.difference
                found.append(
                    f"{row.asked.name} loses to {other.name}: {row.figures[0].name} differs by "
                    f"{by.value:+.3f} ({by.low:+.3f} to {by.high:+.3f})."
                )
    return found


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
    found = [answers[question.key] for question in usable]
    seen = sum(answer.visual_tokens for answer in found)
    return EvaluationRow(
        asked,
        len(usable),
        sum(answer.tokens_kept for answer in found) / max(1, seen),
        figures_of(metric, usable, judged),
        difference(metric, judged, baseline) if baseline else None,
        agreement(judged, baseline) if baseline else None,
        sum(answer.finish_reason == "length" for answer in found),
        tuple(f"{q.where}: {answers[q.key].error}" for q in questions.usable if q.key not in judged),
    )


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
