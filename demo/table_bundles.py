"""Exact match of methods inside the LLM, measured on exported bundles in the runtime that users run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visprune.demo.answers import generations
from visprune.demo.scenes import SceneQuestion
from visprune.errors import UnsupportedError
from visprune.estimate.flops import savings
from visprune.evaluation.metrics import exact_match
from visprune.export import export
from visprune.runtime import load

__all__ = ["Result", "evaluate_inside"]


@dataclass(frozen=True, slots=True)
class Result:
    """Exact match of one method at one ratio.

    Attributes:
        method: Name of the method.
        ratio: The ratio that was asked for.
        kept: Visual tokens kept. For a method inside the LLM: those that enter each layer.
        work: Share of the decoder's work on visual tokens that is left (F3).
        right: Questions answered right.
        of: Number of questions.
    """

    method: str
    ratio: float
    kept: str
    work: float
    right: int
    of: int


def evaluate_inside(
    checkpoint: Path, images: NDArray[np.uint8], asked: Sequence[SceneQuestion], ratios: Sequence[float]
) -> list[Result]:
    """Measure every method inside the LLM, and one composition of two methods, at every ratio.

    For fastv and pyramiddrop a ratio is the share of tokens left after the last prune point, for fitprune the
    share of visual work left. In the composition it is the ratio of the first method, and fastv then keeps
    half. A ratio that no recipe reaches has no result.

    Args:
        checkpoint: Directory of the demo model.
        images: [B, S, S, 3].
        asked: One question about each image.
        ratios: The ratios.
    """
    results = []
    for ratio in ratios:
        for name, options in (
            ("fastv", {"method": "fastv", "ratio": ratio}),
            ("pyramiddrop", {"method": "pyramiddrop", "ratio": ratio}),
            ("fitprune", {"method": "fitprune", "ratio": ratio}),
            ("fopru-rank, then fastv", {"method": "fopru-rank", "ratio": ratio, "then": "fastv:0.5"}),
        ):
            try:
                results.append(_run(checkpoint, name, options, images, asked))
            except UnsupportedError as error:
                print(f"{name} {ratio:g}: {error.what}")
    return sorted(results, key=lambda result: result.method)


def _run(
    checkpoint: Path,
    name: str,
    options: dict[str, Any],
    images: NDArray[np.uint8],
    asked: Sequence[SceneQuestion],
) -> Result:
    """Export a bundle with these options, ask it, and count the right answers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = export(checkpoint, output=folder / "bundle", verify=False, **options)
        pipeline = stack.enter_context(load(bundle.path))
        right = 0
        for answer, question in zip(generations(pipeline, images, asked), asked, strict=True):
            right += exact_match(answer.text, (question.answer,))
        found = savings(bundle.manifest)
        work = found.visual.pruned / found.visual.unpruned if found else float("nan")
        kept = " > ".join(map(str, answer.layer_tokens))
        return Result(name, options["ratio"], kept, work, right, len(asked))
