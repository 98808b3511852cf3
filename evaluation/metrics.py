"""Metrics: how an answer is judged.

A metric is one function and one line in `METRICS`; the figures of all answers are in `figures`.

Every metric judges the text of an answer alone. Why generation ended is not asked: an answer that the limit
of new tokens cut off right after the correct text counts as right. The scripts of VQA and POPE judge so too,
and the limit is often set to the length of an answer (1 for a letter): then no answer can end by itself. An
answer that goes on after the correct text is another text, and wrong anyway. The number of answers that were
cut off is reported beside the figures (`summary.EvaluationRow.cut`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visprune.evaluation.answer_text import plain, said_letter, vqa_plain, yes_or_no
from visprune.evaluation.questions import Question
from visprune.names import lookup

__all__ = ["METRICS", "Judgement", "Metric", "exact_match", "metric_named", "vqa_accuracy"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """A metric's judgement of one answer.

    Attributes:
        score: From 0 to 1.
        said: The answer as the metric understood it. Two answers agree if these are equal.
    """

    score: float
    said: str


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Return whether a text is one of the right answers.

    Case, white space and a full stop at the end make no difference.
    """
    return plain(text) in map(plain, answers)


def _exact(question: Question, text: str) -> Judgement:
    return Judgement(float(exact_match(text, question.answers)), plain(text))


def _vqa(question: Question, text: str) -> Judgement:
    said = vqa_plain(text)
    return Judgement(vqa_accuracy(said, [vqa_plain(answer) for answer in question.answers]), said)


def vqa_accuracy(said: str, answers: list[str]) -> float:
    """Return the VQA accuracy (Antol et al., ICCV 2015; https://visualqa.org/evaluation.html).

    It is min(people who gave this answer / 3, 1), averaged over all subsets that leave out one person;
    usually there are ten people.
    """
    same = Counter(answers)[said]
    others = len(answers) - same
    return (same * min((same - 1) / 3, 1.0) + others * min(same / 3, 1.0)) / len(answers)


def _yes_no(question: Question, text: str) -> Judgement:
    said = yes_or_no(text)
    return Judgement(float(said == plain(question.answers[0])), said)


def _choice(question: Question, text: str) -> Judgement:
    said = said_letter(text, question.choices)
    return Judgement(float(said in question.answers), said or plain(text))


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to judge.

    Attributes:
        name: The name as the user gives it.
        title: Title of its first figure.
        judge: Judges the text of an answer to a question.
        why_not: Returns why a question cannot be judged by this metric, or None if it can.
        binary: Whether an answer is either right or wrong; otherwise scores may lie between 0 and 1.
    """

    name: str
    title: str
    judge: Callable[[Question, str], Judgement]
    why_not: Callable[[Question], str | None] = lambda _: None
    binary: bool = True

    def problem(self, question: Question) -> str | None:
        """Return a sentence if a question cannot be judged by this metric."""
        why = self.why_not(question)
        return f"{question.where}: {why}." if why else None


def _not_for_vqa(question: Question) -> str | None:
    count = len(question.answers)
    if count > 3:
        return None
    return f"VQA accuracy needs the answers of at least 4 people, and there are {count}"


def _not_for_yes_no(question: Question) -> str | None:
    known = [plain(answer) for answer in question.answers]
    return None if known in (["yes"], ["no"]) else f"the answer is {question.answers[0]!r}, not yes or no"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", "exact match", _exact),
        Metric("vqa", "VQA accuracy", _vqa, _not_for_vqa, binary=False),
        Metric("yes-no", "accuracy", _yes_no, _not_for_yes_no),
        Metric("choice", "accuracy", _choice, lambda q: None if q.choices else "there are no choices"),
    )
}
"""Name -> metric."""


def metric_named(name: str) -> Metric:
    """Return the metric of a name.

    Raises:
        UsageError: There is none of that name.
    """
    return lookup(name, METRICS, "metric")
