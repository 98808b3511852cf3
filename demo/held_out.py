"""The held-out questions of the demo model, which PyTorch and bundles are both asked.

`python -m visprune.demo.held_out DIR` writes them as a data set for `visprune-eval`: questions.jsonl and the
images. This module knows no model, and needs neither PyTorch nor transformers.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.demo.scenes import SceneQuestion, draw, questions
from visprune.evaluation.intervals import wilson
from visprune.evaluation.questions import Question, Questions

__all__ = ["FIRST_TEST_SCENE", "held_out", "held_out_questions", "main", "wilson"]

FIRST_TEST_SCENE = 500_000
"""Seed of the first scene that tables are measured on; the training log uses the seeds from 0 on."""


def held_out(count: int, first: int = FIRST_TEST_SCENE) -> tuple[NDArray[np.uint8], list[SceneQuestion]]:
    """Draw the scenes of `count` seeds from `first` on, with one question each.

    The seeds are below those of training. A smaller `count` gives the first scenes of a larger one.

    Returns:
        Images [B, S, S, 3], and a question about each.
    """
    images, things = draw(range(first, first + count))
    rng = np.random.default_rng(first)
    return images, [questions(t, rng)[0] for t in things]


def held_out_questions(count: int) -> Questions:
    """Return the first held-out questions as `visprune.evaluation.evaluate` takes them."""
    images, asked = held_out(count)
    return Questions(
        f"the first {count} held-out questions of the demo model",
        tuple(
            Question(str(number), f"Question {number}", _png(image), question.text, (question.answer,))
            for number, (image, question) in enumerate(zip(images, asked, strict=True), 1)
        ),
    )


def _png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write questions.jsonl and the images that it names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--questions", type=int, default=2000)
    options = parser.parse_args(arguments)
    if options.questions < 1:
        parser.error("--questions must be at least 1")
    scenes = options.folder / "scenes"
    scenes.mkdir(parents=True, exist_ok=True)
    lines = []
    for question in held_out_questions(options.questions).usable:
        path = scenes / f"{question.key}.png"
        assert isinstance(question.image, bytes)
        path.write_bytes(question.image)
        line = {"image": f"{scenes.name}/{path.name}", "question": question.text}
        lines.append(json.dumps({**line, "answers": question.answers}))
    (options.folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
