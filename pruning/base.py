"""Protocols of a pruning method, before the LLM and inside it, and the defaults of one that counts tokens.

A method knows scores, indices and counts. It does not know models, graphs or files: the exporter gives it the
signals or the attention that it names, and gathers the tokens that it selects. What the exporter relies on
are protocols and not base classes, so that a method of another package need not import visprune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from visprune.budget import Budget, LayerBudget
from visprune.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "LayerPruner",
    "Layout",
    "Merged",
    "RatingPruner",
    "TokenMethod",
    "Traits",
    "VisionPruner",
    "square_side",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """The visual tokens of one image, as a method sees them.

    Attributes:
        visual_tokens: N, the number of visual tokens.
        grid: Rows and columns of patches; None if the tokens are not a whole grid.
        has_cls: Whether the vision tower has a CLS token.
        drops_cls: Whether that token reaches the LLM only if a method puts it among the tokens. False where
            it is kept anyway, and where an image is several tiles, between whose rows it has no place.
    """

    visual_tokens: int
    grid: tuple[int, int] | None
    has_cls: bool = True
    drops_cls: bool = False


class Merged(NamedTuple):
    """The tokens that a merging method makes.

    Attributes:
        tokens: [T, K, Dv], in the order in which the LLM gets them.
        indices: [T, K] int64, in [0, N), the patch that each token stands for; -1 for the CLS token.
        weights: [T, K, N] float32, the weight of each patch in each token; the row of the CLS token is zeros.
    """

    tokens: Tensor
    indices: Tensor
    weights: Tensor


def square_side(layout: Layout, method: str) -> int:
    """Return the side of a square grid of patches.

    Raises:
        UnsupportedError: The visual tokens are not a square grid.
    """
    if layout.grid is None or layout.grid[0] != layout.grid[1]:
        raise UnsupportedError(
            f"{method} needs a square grid of patches, which this model's {layout.visual_tokens} visual "
            "tokens are not.",
            "Use fopru-rank, which keeps single tokens.",
        )
    return layout.grid[0]


@dataclass(frozen=True, slots=True)
class Traits:
    """Optional class variables of a method before the LLM, each False unless the method says otherwise.

    Attributes:
        projected: All tokens go through the projector before the method selects, and it sees them projected.
        chained: The method picks step by step, so rounding that changes one pick changes later ones. The
            self-check then allows larger differences between kept sets.
        across_tiles: The method scores single tokens, alike in every tile, so it can choose among all tiles
            of a picture at once.
        needs_text: The choice depends on the question. `signals["question_embeds"]` then has the LLM's
            embeddings of the question's tokens, [S, D] float32, with S >= 1 symbolic.
        merges: Tokens are made out of several. `select` then returns `Merged` instead of indices. With K = N
            it returns all tokens unchanged.
        resizes: The image is made smaller before the vision tower, so that its patches are K.
    """

    projected: bool = False
    chained: bool = False
    across_tiles: bool = False
    needs_text: bool = False
    merges: bool = False
    resizes: bool = False

    @classmethod
    def of(cls, method: object) -> Traits:
        """Return the traits of a method or of its class."""
        return cls(**{one.name: bool(getattr(method, one.name, False)) for one in fields(cls)})


@runtime_checkable
class VisionPruner(Protocol):
    """Protocol of a pruning method before the LLM. Implement it as a frozen dataclass of knobs.

    The class variables of `Traits` are optional. They are not members here, because a method without them
    keeps the protocol.

    Attributes:
        place: Where the method prunes, for people.
        paper: Source of the definition.
        positions: How kept tokens are numbered for the LLM.
    """

    place: ClassVar[str]
    paper: ClassVar[str]
    positions: ClassVar[Literal["contiguous"]]

    @property
    def signals(self) -> tuple[str, ...]:
        """Names from `pruning.signals.SIGNALS` that the vision encoder must put out."""

    def budget(self, layout: Layout) -> Budget:
        """Return how the method counts the tokens of such images.

        Raises:
            UnsupportedError: The method cannot work on this layout.
        """

    def constants(self, layout: Layout) -> dict[str, NDArray[np.float32]]:
        """Return arrays to bake into the graph, by name; `select` gets them together with the signals."""

    def select(
        self,
        features: Tensor,
        signals: Mapping[str, Tensor],
        keep_tokens: int,
        layout: Layout,
        valid: Tensor | None = None,
    ) -> Tensor | Merged:
        """Choose the tokens to keep. It is traced into the graph, so `keep_tokens` may be symbolic.

        Args:
            features: [T, N, Dv], the visual tokens without any CLS; [T, N, D] for a `projected` method.
            signals: Each [T, ...] in its own shape, float32; constants in theirs.
            keep_tokens: K, the number of tokens to keep.
            layout: Meaning of the N tokens.
            valid: [T, N] bool, False where a tile shows only the padding around a picture; None if nothing is
                padded. Padding is kept only in a tile with fewer than K tokens, and is removed afterwards.

        Returns:
            [T, K] int64, ascending, distinct, in [0, N); for a merging method `Merged`.
        """


class TokenMethod:
    """Defaults of a method before the LLM that counts single tokens, and needs no signals and no constants.

    A method that derives from it defines `paper` and `select`, and overrides what differs.
    """

    __slots__ = ()

    place: ClassVar[str] = "before the LLM"
    positions: ClassVar[Literal["contiguous"]] = "contiguous"

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that the vision encoder must put out: none."""
        return ()

    def budget(self, layout: Layout) -> Budget:
        """Count single tokens."""
        return Budget(layout.visual_tokens)

    def constants(self, layout: Layout) -> dict[str, NDArray[np.float32]]:
        """Return no arrays."""
        return {}


@runtime_checkable
class LayerPruner(Protocol):
    """Protocol of a pruning method inside the LLM. Implement it as a frozen dataclass of knobs.

    Attributes:
        place: Where the method prunes, for people.
        paper: Source of the definition.
        positions: Whether kept tokens keep their original positions or are numbered anew.
        boundary: Where tokens leave. "attention": after the attention block of a prune layer and before its
            MLP, scored by that layer's attention. "layer": between a prune layer and the next, scored by the
            next layer's attention.
        rows: The queries whose attention is needed: all new tokens, the last one, or the mean of those that
            the method itself names, which is then a `RatingPruner`. A method that needs the last row alone
            never has a square matrix computed.
        heads: How the probabilities of the heads are combined; "mean" for a `RatingPruner`.
    """

    place: ClassVar[str]
    paper: ClassVar[str]
    positions: ClassVar[Literal["original", "renumbered"]]
    boundary: ClassVar[Literal["attention", "layer"]]
    rows: ClassVar[Literal["all", "last", "raters"]]
    heads: ClassVar[Literal["mean", "max"]]

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the prune layers, 0-based and ascending.

        Raises:
            UnsupportedError: The method cannot work on a decoder with this number of layers.
        """

    def budget(self, points: int) -> LayerBudget:
        """Return how the method counts at its prune points."""

    def score(self, attention: Tensor, is_visual: Tensor) -> Tensor:
        """Score each new token by how much it matters. Scores of text tokens are ignored. Traced.

        Args:
            attention: [B, S, S] float32, probabilities among the new tokens; [B, 1, S] for the last row or
                the mean of the raters' rows.
            is_visual: [B, S] bool.

        Returns:
            [B, S] float32.
        """


@runtime_checkable
class RatingPruner(LayerPruner, Protocol):
    """Protocol of a pruning method inside the LLM that chooses, before the first layer, which tokens rate.

    Its `rows` are "raters". The choice goes with the tokens to every prune layer.
    """

    def raters(self, embeds: Tensor, is_visual: Tensor) -> Tensor:
        """Choose the tokens whose attention the scores come from. Traced.

        Args:
            embeds: [B, S, D], input embeddings of the new tokens.
            is_visual: [B, S] bool.

        Returns:
            [B, S] bool. Where no token rates, the last one that reaches a prune layer does.
        """
