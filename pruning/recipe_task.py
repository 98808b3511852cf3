"""Input of a FitPrune search: samples, their attention, and the work to save."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from visprune.errors import UnsupportedError
from visprune.work import LayerWork

__all__ = ["Attention", "FitSample", "Floats", "Pass", "Step", "Task", "Unpruned", "no_step", "rounded_up"]

Floats = NDArray[np.float64]
Step = Callable[[int, int], None]
"""Called with the steps done and their total; a search may need fewer."""


def no_step(done: int, total: int) -> None:
    """Report nothing."""


class Attention(NamedTuple):
    """Statistics of one layer's attention to the n visual tokens left; M [S, S] is the maximum over heads.

    Attributes:
        self_: [n], the mean of M[i, j] over the n visual tokens i.
        cross: [n], the mean of M[i, j] over the text tokens i after the image.
    """

    self_: Floats
    cross: Floats


class Pass(Protocol):
    """Protocol of one sample on its way through the decoder; as a protocol, tests need no model."""

    def attend(self, layer: int) -> Attention:
        """Go on to `layer`, which must be the next layer, and return its attention."""

    def delete(self, indices: NDArray[np.int64]) -> None:
        """Drop visual tokens after that attention; the indices count the tokens left."""

    def copy(self) -> Pass:
        """Return an independent pass at the same place."""


class FitSample(Protocol):
    """Protocol of an image and a prompt that a recipe is fitted on."""

    def start(self) -> Pass:
        """Return a pass before the first layer."""


@dataclass(frozen=True, slots=True)
class Task:
    """Sizes of the decoder, and the work that a scheme may keep.

    Attributes:
        num_layers: L, layers of the decoder.
        visual_tokens: N, visual tokens of a sample.
        work: Work of one layer.
        ratio: Fraction of the visual work to keep.
    """

    num_layers: int
    visual_tokens: int
    work: LayerWork
    ratio: float

    @property
    def full(self) -> int:
        """Visual work of one unpruned sample."""
        return self.num_layers * self.work.layer(self.visual_tokens)

    def forecast(self, tokens: int, layer: int) -> int:
        """Return the work from `layer` on if nothing more is deleted."""
        return (self.num_layers - layer) * self.work.layer(tokens)

    def least(self, tokens: int, layer: int, allowed: Collection[int]) -> int:
        """Return the least work from `layer` on: the next layer that may delete leaves one token."""
        following = [index for index in allowed if index >= layer]
        if not following:
            return self.forecast(tokens, layer)
        first = min(following)
        before = (first - layer) * self.work.layer(tokens) + self.work.before_deletion(tokens)
        return before + self.work.after_deletion(1) + self.forecast(1, first + 1)

    def check_possible(self, allowed: Collection[int]) -> None:
        """Refuse a ratio that no deletion at these layers reaches.

        Raises:
            UnsupportedError: The ratio is too small.
        """
        least = self.least(self.visual_tokens, 0, allowed)
        if self.ratio * self.full < least:
            raise UnsupportedError(
                f"{self.ratio:g} of the visual work cannot be reached: with one token left after the first "
                f"layer that deletes, it is still {least / self.full:.4f}.",
                f"Ask for a ratio of at least {rounded_up(least / self.full)}.",
            )


@dataclass(frozen=True, slots=True)
class Unpruned:
    """Statistics of the unpruned model, [L, S, N] each; see `Attention`."""

    self_: Floats
    cross: Floats


def rounded_up(ratio: float) -> float:
    """Round a ratio up to three places, so that it can be asked for and reached."""
    return float(np.ceil(ratio * 1000) / 1000)
