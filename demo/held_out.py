"""The held-out questions, and what is made of the answers: the same for PyTorch and for bundles.

This module knows no model, and needs neither PyTorch nor transformers.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from visprune.demo.scenes import Question, draw, questions

__all__ = ["FIRST_TEST_SCENE", "held_out", "wilson"]

FIRST_TEST_SCENE = 500_000
"""Seed of the first scene that tables look at; the training log looks at those from 0 on."""


def held_out(count: int, first: int = FIRST_TEST_SCENE) -> tuple[NDArray[np.uint8], list[Question]]:
    """The scenes of `count` seeds from `first` on, below those of training, with one question each.

    Fewer of them are the first ones of more.

    Returns:
        Images [B, S, S, 3], and a question about each.
    """
    images, things = draw(range(first, first + count))
    rng = np.random.default_rng(first)
    return images, [questions(t, rng)[0] for t in things]


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95% by default."""
    p = right / of
    centre = p + z * z / (2 * of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return (centre - half) / (1 + z * z / of), (centre + half) / (1 + z * z / of)
