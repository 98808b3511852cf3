"""How workers are asked: the type of a function that asks them, and a window of questions in progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from visprune.evaluation.answering import Answer, AnswerJob
from visprune.evaluation.questions import Question

__all__ = ["AHEAD", "Ask", "windowed"]

AHEAD = 4
"""Questions submitted to each worker at a time, so that none waits for the process that submits them."""

Ask = Callable[[AnswerJob, Sequence[Question]], Iterator[Answer]]
"""Asks one candidate questions; the answers come in any order."""

T = TypeVar("T")


def windowed(
    questions: Sequence[Question],
    submit: Callable[[Question], T],
    wait_some: Callable[[list[T]], tuple[list[T], list[T]]],
    width: int,
) -> Iterator[T]:
    """Submit questions, with at most `width` in progress, and yield the handle of each as it is done.

    Args:
        questions: In the order to submit them.
        submit: Starts one question, and returns its handle.
        wait_some: Waits until at least one handle is done, and splits the handles into done and not done.
        width: The most handles in progress.
    """
    waiting: list[T] = []
    coming = iter(questions)
    while True:
        for question in coming:
            waiting.append(submit(question))
            if len(waiting) == width:
                break
        if not waiting:
            return
        done, waiting = wait_some(waiting)
        yield from done
