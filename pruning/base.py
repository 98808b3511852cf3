"""The protocol of a method that prunes before the LLM.

A method knows scores, indices and counts. It does not know models, graphs or files: the exporter
gives it the signals it names, and gathers and projects the tokens it selects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from visprune.budget import Budget

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Layout", "VisionPruner"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The visual tokens of one image, as a method sees them.

    Attributes:
        visual_tokens: N.
        grid: Rows and columns, or None where the tokens are not a whole grid of patches.
    """

    visual_tokens: int
    grid: tuple[int, int] | None


@runtime_checkable
class VisionPruner(Protocol):
    """What a pruning method before the LLM offers. Implement it as a frozen dataclass of knobs.

    It is a protocol, and not a base class, so that another package's method need not import visprune.

    Attributes:
        place: Where it prunes, for people.
        paper: Where the definition comes from.
        positions: How survivors are numbered for the LLM.
    """

    place: ClassVar[str]
    paper: ClassVar[str]
    positions: ClassVar[Literal["contiguous"]]

    @property
    def signals(self) -> tuple[str, ...]:
        """Names from `pruning.signals.SIGNALS` that the vision encoder must put out."""

    def budget(self, layout: Layout) -> Budget:
        """How this method counts for such images.

        Raises:
            UnsupportedError: The method cannot work on this layout.
        """

    def constants(self, layout: Layout) -> dict[str, NDArray[np.float32]]:
        """Arrays to bake into the graph; they reach `select` beside the signals."""

    def select(
        self, features: Tensor, signals: Mapping[str, Tensor], keep_tokens: int, layout: Layout
    ) -> Tensor:
        """Choose the tokens to keep; traced into the graph, so `keep_tokens` may be symbolic.

        Args:
            features: [T, N, Dv], the visual tokens without any CLS.
            signals: Each [T, N] in float32; constants in the shape given.
            keep_tokens: K.
            layout: What N stands for.

        Returns:
            [T, K] int64, ascending, distinct, in [0, N).
        """
