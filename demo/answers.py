"""Exact match of bundles of the demo model: `python -m visprune.demo.answers BUNDLE...`.

The scenes and questions are those of `evaluate.py`, and answers are judged as there; but a bundle goes
through the runtime that users run, image processor and chat template included. So this needs neither PyTorch
nor transformers, and tells what a change to a bundle costs: numbers of a lower precision, for instance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.demo.held_out import held_out_questions
from visprune.demo.scenes import SceneQuestion
from visprune.errors import VispruneError
from visprune.evaluation.answering import AnswerSettings
from visprune.evaluation.evaluator import evaluate
from visprune.evaluation.summary import Evaluation, EvaluationRow
from visprune.evaluation.workers import Workers
from visprune.runtime import Generation, Pipeline
from visprune.terminal import bars

__all__ = ["exact_match", "generations", "is_right", "main"]

_ANSWER_TOKENS = 8  # a right one has three at most, its end included


def generations(
    pipeline: Pipeline, images: NDArray[np.uint8], asked: Sequence[SceneQuestion]
) -> Iterator[Generation]:
    """What a bundle answers to each question about its image [S, S, 3], greedily and one by one."""
    for image, question in zip(images, asked, strict=True):
        yield pipeline.generate(Image.fromarray(image), question.text, max_new_tokens=_ANSWER_TOKENS)


def is_right(answer: Generation, question: SceneQuestion) -> bool:
    """Whether an answer is exactly the right one, and ends there."""
    return answer.finish_reason == "eos" and answer.text.strip() == question.answer


def exact_match(pipeline: Pipeline, images: NDArray[np.uint8], asked: Sequence[SceneQuestion]) -> list[bool]:
    """Whether each answer is right. `held_out(count)` gives the images [B, S, S, 3] and the questions."""
    answers = generations(pipeline, images, asked)
    return [is_right(answer, question) for answer, question in zip(answers, asked, strict=True)]


def _line(found: Evaluation, row: EvaluationRow) -> str:
    """The figures of a bundle, for people."""
    exact, same = row.figures[0], row.agreement
    share = "" if same is None else f"  {same.value:.4f} as {found.baseline}"
    return f"{exact.value:.4f} ({exact.low:.4f} to {exact.high:.4f})  {row.asked.name}{share}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "bundles", nargs="+", metavar="BUNDLE", help="directory of a bundle of the demo model"
    )
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if options.questions < 1:
        parser.error("--questions must be at least 1")
    try:
        with bars() as progress:
            found = evaluate(
                options.bundles,
                held_out_questions(options.questions),
                settings=AnswerSettings(_ANSWER_TOKENS),
                workers=Workers(options.processes),
                progress=progress,
            )
    except VispruneError as error:
        sys.exit(f"{error.what}\n{error.hint}")
    for row in found.rows:
        print(_line(found, row))
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
