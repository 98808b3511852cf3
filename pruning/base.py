"""The two protocols of a pruning method: before the LLM, and inside it.

A method knows scores, indices and counts. It does not know models, graphs or files: the exporter
gives it the signals or the attention it names, and gathers the tokens it selects. They are protocols,
and not base classes, so that another package's method need not import visprune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from visprune.budget import Budget, LayerBudget
from visprune.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["LayerPruner", "Layout", "VisionPruner", "need_cls"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The visual tokens of one image, as a method sees them.

    Attributes:
        visual_tokens: N.
        grid: Rows and columns, or None where the tokens are not a whole grid of patches.
        has_cls: Whether the tower has a CLS token.
    """

    visual_tokens: int
    grid: tuple[int, int] | None
    has_cls: bool = True


def need_cls(layout: Layout, method: str) -> None:
    """Refuse a tower without a CLS token, for a method that scores with it.

    Raises:
        UnsupportedError: There is none.
    """
    if not layout.has_cls:
        raise UnsupportedError(
            f"{method} scores with the CLS token, which this model's vision tower does not have.",
            "Use fopru-rank, which scores with the attention between patches, or divprune.",
        )


@runtime_checkable
class VisionPruner(Protocol):
    """What a pruning method before the LLM offers. Implement it as a frozen dataclass of knobs.

    A method may also have `projected: ClassVar[bool] = True`: then all tokens go through the projector
    before it selects, and it sees them projected. And `chained: ClassVar[bool] = True` where it picks step by
    step, so that rounding which changes one pick changes later ones: the self-check then allows larger
    differences between kept sets. And `across_tiles: ClassVar[bool] = True` where it scores single tokens,
    alike in every tile, so that it can choose among all tiles of a picture at once. They are no members here,
    because a method without them keeps the protocol.

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
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Choose the tokens to keep; traced into the graph, so `keep_tokens` may be symbolic.

        Args:
            features: [T, N, Dv], the visual tokens without any CLS; [T, N, D] for a `projected` method.
            signals: Each [T, N], or [T, N, N] for a matrix, in float32; constants in the shape given.
            keep_tokens: K.
            layout: What N stands for.
            valid: [T, N] bool, False where a tile shows only the padding around a picture; None where nothing
                is padded. Padding is taken only where a tile has fewer than K tokens, and leaves afterwards.

        Returns:
            [T, K] int64, ascending, distinct, in [0, N).
        """


@runtime_checkable
class LayerPruner(Protocol):
    """What a pruning method inside the LLM offers. Implement it as a frozen dataclass of knobs.

    Attributes:
        place: Where it prunes, for people.
        paper: Where the definition comes from.
        positions: Whether survivors keep their original positions or are numbered anew.
        boundary: Where tokens leave: after the attention block of a prune layer and before its MLP, scored
            by that layer's attention; or between it and the next layer, scored by the next one's.
        rows: The queries whose attention is wanted: all new tokens, or the last one. A method that asks
            for the last row never has a square matrix computed.
        heads: How the heads' probabilities become one.
    """

    place: ClassVar[str]
    paper: ClassVar[str]
    positions: ClassVar[Literal["original", "renumbered"]]
    boundary: ClassVar[Literal["attention", "layer"]]
    rows: ClassVar[Literal["all", "last"]]
    heads: ClassVar[Literal["mean", "max"]]

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The prune layers, 0-based and ascending.

        Raises:
            UnsupportedError: The method cannot work on a decoder of so many layers.
        """

    def budget(self, points: int) -> LayerBudget:
        """How this method counts at its prune points."""

    def score(self, attention: Tensor, is_visual: Tensor) -> Tensor:
        """How much each new token matters; those of text are not looked at. Traced into the graph.

        Args:
            attention: [B, S, S] float32, probabilities among the new tokens; [B, 1, S] for the last row.
            is_visual: [B, S] bool.

        Returns:
            [B, S] float32.
        """
