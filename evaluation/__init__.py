"""Evaluation: questions with known answers are asked of bundles, judged, and compared question by question.

questions       a question, and the JSONL file of questions
question_files  the files of a published set
published       readers of published sets
formats         the table of formats
answering       one bundle answers one question
asking          the type of a function that asks, and a window of questions in progress
workers         the processes that answer
cluster         the same on a Ray cluster
ledger          the file of answers, from which an interrupted run continues
answer_text     normal forms of a text, and the letter or the yes or no in it
metrics         whether an answer is right
intervals       95% intervals
figures         figures with their intervals, from judged answers
summary         the results of all bundles, compared
evaluator       the evaluation as a whole
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from visprune.packages import lazy

if TYPE_CHECKING:
    from visprune.evaluation.evaluator import evaluate
    from visprune.evaluation.formats import read_questions

__all__ = ["evaluate", "read_questions"]

_LAZY = {
    "evaluate": "visprune.evaluation.evaluator",
    "read_questions": "visprune.evaluation.formats",
}

__getattr__ = lazy(__name__, _LAZY)
