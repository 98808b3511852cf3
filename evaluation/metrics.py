"""What judges an answer. A metric is one function and one line in `METRICS`; the figures are in `summary`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from visprune.evaluation.answer_text import plain, said_letter, vqa_plain, yes_or_no
from visprune.evaluation.questions import Question
from visprune.names import lookup

__all__ = ["METRICS", "Judgement", "Metric", "metric_named", "vqa_accuracy"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a metric makes of one answer.

    Attributes:
        score: From 0 to 1.
        said: What it took the answer to say; two answers that say the same agree.
    """

    score: float
    said: str


def _exact(question: Question, text: str) -> Judgement:
    said = plain(text)
    return Judgement(float(said in map(plain, question.answers)), said)


def _vqa(question: Question, text: str) -> Judgement:
    said = vqa_plain(text)
    return Judgement(vqa_accuracy(said, [vqa_plain(answer) for answer in question.answers]), said)


def vqa_accuracy(said: str, answers: list[str]) -> float:
    """The accuracy of VQA (Antol et al., ICCV 2015; https://visualqa.org/evaluation.html).

    min(people who said so / 3, 1), the mean over the subsets of all people but one; usually of ten.
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
        name: As the user gives it.
        title: Of its first figure.
        judge: The answer to a question.
        why_not: Why a question cannot be judged so, or None.
        binary: Whether an answer is right or wrong, and nothing between.
    """

    name: str
    title: str
    judge: Callable[[Question, str], Judgement]
    why_not: Callable[[Question], str | None] = lambda _: None
    binary: bool = True

    def problem(self, question: Question) -> str | None:
        """A sentence, if a question cannot be judged so."""
        why = self.why_not(question)
        return f"{question.where}: {why}." if why else None


def _not_for_vqa(question: Question) -> str | None:
    count = len(question.answers)
    return (
        None if count > 3 else f"VQA accuracy needs the answers of at least 4 people, and there are {count}"
    )


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


def metric_named(name: str) -> Metric:
    """The metric of a name.

    Raises:
        UsageError: There is none.
    """
    return lookup(name, METRICS, "metric")
