"""What a FitPrune search works on: samples, their attention, and the work it is to save."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from visprune.errors import UnsupportedError
from visprune.work import LayerWork

__all__ = ["Attention", "Floats", "Pass", "Sample", "Step", "Task", "Unpruned", "rounded_up"]

Floats = NDArray[np.float64]
Step = Callable[[int, int], None]
"""Called with the steps done and all of them; a search may need fewer."""


class Attention(NamedTuple):
    """What one layer's attention says of the n visual tokens left; M is the maximum over heads, [S, S].

    Attributes:
        self_: [n], the mean of M[i, j] over the n visual tokens i.
        cross: [n], the mean of M[i, j] over the text tokens i after the image.
    """

    self_: Floats
    cross: Floats


class Pass(Protocol):
    """One sample on its way through the decoder. A protocol, so that tests need no model."""

    def attend(self, layer: int) -> Attention:
        """Go on to the attention of `layer`, which is the next one."""

    def delete(self, indices: NDArray[np.int64]) -> None:
        """Drop visual tokens after that attention; the indices count those left."""

    def copy(self) -> Pass:
        """The same place, from where to go on differently."""


class Sample(Protocol):
    """An image and a prompt."""

    def start(self) -> Pass:
        """A pass before the first layer."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is searched for.

    Attributes:
        num_layers: L.
        visual_tokens: N.
        work: Of one layer.
        ratio: Fraction of the visual work to keep.
    """

    num_layers: int
    visual_tokens: int
    work: LayerWork
    ratio: float

    @property
    def full(self) -> int:
        """The visual work of one unpruned sample."""
        return self.num_layers * self.work.layer(self.visual_tokens)

    def forecast(self, tokens: int, layer: int) -> int:
        """The work from `layer` on, if nothing more is deleted."""
        return (self.num_layers - layer) * self.work.layer(tokens)

    def least(self, tokens: int, layer: int, allowed: Collection[int]) -> int:
        """The least work from `layer` on: at the next layer that may delete, all tokens but one go."""
        following = [index for index in allowed if index >= layer]
        if not following:
            return self.forecast(tokens, layer)
        first = min(following)
        before = (first - layer) * self.work.layer(tokens) + self.work.before_deletion(tokens)
        return before + self.work.after_deletion(1) + self.forecast(1, first + 1)

    def check_possible(self, allowed: Collection[int]) -> None:
        """Refuse a ratio that no deletion at these layers reaches.

        Raises:
            UnsupportedError: It is too small.
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
    """The statistics of the unpruned model, [L, S, N] each."""

    self_: Floats
    cross: Floats


def rounded_up(ratio: float) -> float:
    """To three places, so that it can be asked for."""
    return float(np.ceil(ratio * 1000) / 1000)
