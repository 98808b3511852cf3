"""Exact match of bundles of the demo model: `python -m visprune.demo.answers BUNDLE...`.

The scenes and questions are those of `evaluate.py`, but a bundle goes through the runtime that users run,
image processor and chat template included. So this needs neither PyTorch nor transformers. It measures what a
change to a bundle costs, for instance a lower precision.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
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
from visprune.evaluation.metrics import exact_match
from visprune.evaluation.summary import Evaluation, EvaluationRow
from visprune.evaluation.workers import Workers
from visprune.runtime import Pipeline
from visprune.terminal import bars

__all__ = ["ANSWER_TOKENS", "main", "right_answers"]

ANSWER_TOKENS = 8  # a right answer has three at most, its end included


def right_answers(
    pipeline: Pipeline, images: NDArray[np.uint8], asked: Sequence[SceneQuestion]
) -> list[bool]:
    """Return for each question whether the answer is an exact match, as the evaluation defines it.

    Args:
        pipeline: A bundle of the demo model.
        images: From `held_out`, [B, S, S, 3].
        asked: From `held_out`, one question about each image.
    """
    right = []
    for image, question in zip(images, asked, strict=True):
        answer = pipeline.generate(Image.fromarray(image), question.text, max_new_tokens=ANSWER_TOKENS)
        right.append(exact_match(answer.text, (question.answer,)))
    return right


def _line(found: Evaluation, row: EvaluationRow) -> str:
    """Return the line of a bundle for people."""
    exact, same = row.figures[0], row.agreement
    share = "" if same is None else f"  {same.value:.4f} as {found.baseline}"
    return f"{exact.value:.4f} ({exact.low:.4f} to {exact.high:.4f})  {row.asked.name}{share}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each bundle."""
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
                settings=AnswerSettings(ANSWER_TOKENS),
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
