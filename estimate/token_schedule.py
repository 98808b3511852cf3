"""Token counts of a prefill: how many tokens each decoder layer works on, and how many images make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from visprune.errors import UsageError
from visprune.runtime.vision.arrangement import arrange, largest_size
from visprune.runtime.vision.kept_tokens import Keep
from visprune.work import LayerWork

if TYPE_CHECKING:
    from visprune.manifest import LayerPruning, Pruning
    from visprune.tiling import Tiling

__all__ = ["Schedule", "TokenCounts", "count_tokens"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Numbers of tokens that each decoder layer works on in a prefill.

    Attributes:
        entering: Tokens that enter each layer; the layer's cache holds them all.
        staying: Tokens left after each layer's attention; its MLP sees only these.

    Raises:
        UsageError: The counts grow, are negative, or are not two for each layer.
    """

    entering: tuple[int, ...]
    staying: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = len(self.entering) == len(self.staying)
        course = [count for layer in zip(self.entering, self.staying, strict=False) for count in layer]
        shrinks = all(a >= b for a, b in pairwise(course))
        if not whole or not shrinks or min(course, default=0) < 0:
            raise UsageError(
                f"{self.entering} tokens entering and {self.staying} staying are no schedule of pruning.",
                "Give both for each layer; tokens only leave.",
            )

    @classmethod
    def even(cls, num_layers: int, tokens: int) -> Schedule:
        """Return the schedule in which nothing is pruned: the same tokens in every layer."""
        return cls((tokens,) * num_layers, (tokens,) * num_layers)

    @classmethod
    def pruned(
        cls,
        num_layers: int,
        tokens: int,
        points: Sequence[int],
        kept: Sequence[int],
        boundary: Literal["attention", "layer"] = "layer",
    ) -> Schedule:
        """Return the schedule in which tokens leave at prune points inside the LLM.

        FastV with K = 2 has `points=(1,)`: two whole layers see all tokens. Its paper prints the mean over
        the layers, which is `macs` divided by their number. PyramidDrop with stages of 8 layers has
        `points=(7, 15, 23)`.

        Args:
            num_layers: Layers of the decoder.
            tokens: Tokens that enter the first layer.
            points: Prune layers, 0-based and ascending. Tokens leave after the attention of such a layer, or
                after the whole layer: see `boundary`.
            kept: Tokens left after each point.
            boundary: "attention" if tokens leave before the output projection and the MLP of a prune layer,
                "layer" if they leave after it.

        Raises:
            UsageError: A point is no layer, or has no count, or the counts grow.
        """
        known = set(points) <= set(range(num_layers)) and list(points) == sorted(set(points))
        if not known or len(points) != len(kept):
            raise UsageError(
                f"The {len(kept)} counts {tuple(kept)} do not fit the points {tuple(points)} of "
                f"{num_layers} layers.",
                "Give one count for each point; points ascend from 0.",
            )
        entering, staying, left = [], [], tokens
        for layer in range(num_layers):
            entering.append(left)
            after = kept[points.index(layer)] if layer in points else left
            staying.append(after if boundary == "attention" else left)
            left = after
        return cls(tuple(entering), tuple(staying))

    def plus(self, tokens: int) -> Schedule:
        """Return the schedule with more tokens in every layer, such as those of text, which is not pruned."""
        return Schedule(tuple(n + tokens for n in self.entering), tuple(n + tokens for n in self.staying))

    def macs(self, layer: LayerWork) -> int:
        """Return the multiply-accumulates of all layers."""
        pairs = zip(self.entering, self.staying, strict=True)
        return sum(layer.before_deletion(n) + layer.after_deletion(left) for n, left in pairs)

    def cache_bytes(self, num_kv_heads: int, head_dim: int, item_size: int) -> int:
        """Return the bytes of keys and values after the prefill; a layer's cache holds what entered it.

        Args:
            num_kv_heads: Heads of the decoder that have keys and values of their own.
            head_dim: Size of a head.
            item_size: Bytes of a number, 2 for fp16.
        """
        return 2 * num_kv_heads * head_dim * item_size * sum(self.entering)


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Numbers of visual tokens of a prompt at each step through a model, newline tokens included.

    Attributes:
        tiles: Tiles that the vision tower encodes.
        projected: Tokens that go through the projector.
        entering: Tokens that enter the LLM.
        schedule: Tokens that each layer of the LLM works on.
        patches: Patches of a tile in the vision tower, if images are made smaller before it; None: its own.
    """

    tiles: int
    projected: int
    entering: int
    schedule: Schedule
    patches: int | None = None


def count_tokens(
    num_layers: int,
    before: Pruning,
    inside: LayerPruning | None,
    tiling: Tiling | None,
    *,
    keep: int,
    images: int = 1,
    layer_ratio: float | None = None,
    size: tuple[int, int] | None = None,
) -> TokenCounts:
    """Count the visual tokens of a prompt.

    Args:
        num_layers: Layers of the decoder.
        before: Pruning before the LLM.
        inside: Pruning inside the LLM; None if there is none.
        tiling: How images become tiles; None for a model that does not tile them.
        keep: Visual tokens kept of an image, or of each of its tiles, before the LLM.
        images: Images in the prompt.
        layer_ratio: Fraction left inside the LLM; the method's own if None.
        size: Height and width of the images in pixels, for a model that tiles them; if None, each fills the
            largest grid of tiles.

    Raises:
        InputError: An image is too elongated for the model.
        UsageError: A ratio is asked of a recipe, or is outside (0, 1].
    """
    arranged = before.arranged(tiling, keep)
    shown = None if arranged is None else arrange(size or largest_size(arranged), arranged)
    entering = images * Keep(keep).sequence_length(before, shown)
    newlines = images * (0 if shown is None else len(shown.newline_places))
    whole = images * Keep(before.budget.visual_tokens).sequence_length(before, shown)
    schedule = Schedule.even(num_layers, entering)
    if inside is not None:
        left = inside.budget.kept(entering, layer_ratio)
        schedule = Schedule.pruned(num_layers, entering, inside.layers, left, inside.boundary)
    return TokenCounts(
        tiles=images * (1 if shown is None else shown.tiles),
        projected=(whole if before.projects_all else entering) - newlines,
        entering=entering,
        schedule=schedule,
        patches=keep if before.resizes else None,
    )
