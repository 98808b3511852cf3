"""How workers are asked: the type of what answers, and a window of questions that are under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from visprune.evaluation.answering import Answer, AnswerJob
from visprune.evaluation.questions import Question

__all__ = ["AHEAD", "Ask", "windowed"]

AHEAD = 4
"""Questions given to each worker at a time, so that none waits for the process that asks."""

Ask = Callable[[AnswerJob, Sequence[Question]], Iterator[Answer]]
"""Answers questions; the answers come in any order."""

T = TypeVar("T")


def windowed(
    questions: Sequence[Question],
    submit: Callable[[Question], T],
    wait_some: Callable[[list[T]], tuple[list[T], list[T]]],
    width: int,
) -> Iterator[T]:
    """Submit questions, at most `width` ahead, and yield what is done as soon as it is.

    Args:
        questions: In the order to submit them.
        submit: Starts one, and returns its handle.
        wait_some: Splits handles into those that are done, of which it waits for one, and the rest.
        width: Most handles that are under way.
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
