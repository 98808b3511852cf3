"""What pruning saves, by formula: from a schedule of token counts, or from a bundle's manifest.

Three scopes are in print, and a figure means little without its own:

    visual      the decoder's layers, as if the visual tokens were alone (n = visual tokens)
    sequence    the decoder's layers (n = visual + text tokens)
    model       the sequence, and the vision tower, the projector, and the logits of one position

All figures are of the prefill, in multiply-accumulates (MAC) by the formulas of `visprune.work`; a FLOP
count is twice that. Not counted, as nowhere in print: norms, softmax, positions, biases, and the selection
itself. Counted in full, as everywhere in print: keys and values that heads share, and the half of the
attention matrix that is masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from visprune.errors import UsageError
from visprune.runtime.vision.arrangement import arrange, largest_size
from visprune.runtime.vision.kept_tokens import Keep
from visprune.units import ITEM_SIZE
from visprune.work import Convention, LayerWork, Shapes

if TYPE_CHECKING:
    from visprune.manifest import LayerPruning, Manifest, Pruning
    from visprune.tiling import Tiling

__all__ = [
    "TEXT_TOKENS",
    "Saving",
    "Savings",
    "Schedule",
    "TokenCounts",
    "Unit",
    "count_tokens",
    "head_macs",
    "in_unit",
    "patch_embedding_macs",
    "projector_macs",
    "savings",
    "tower_macs",
]

Unit = Literal["MAC", "FLOP"]

TEXT_TOKENS = 64
"""Text tokens of a prompt, where a figure needs a number and none was given."""


def in_unit(macs: int, unit: Unit) -> int:
    """A number of MACs as MAC or as FLOP: one multiply-accumulate is two FLOP."""
    return macs * {"MAC": 1, "FLOP": 2}[unit]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many tokens each decoder layer works on in a prefill.

    Attributes:
        entering: Tokens that enter each layer; its cache holds them all.
        staying: Tokens left after each layer's attention, of which its MLP sees no others.

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
        """The same tokens in every layer: nothing is pruned inside the LLM."""
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
        """Tokens leave at prune points inside the LLM.

        FastV's K = 2 is `points=(1,)`, two whole layers with all tokens: divide `macs` by the number of
        layers for its published mean. PyramidDrop's stages of 8 layers are `points=(7, 15, 23)`.

        Args:
            num_layers: Of the decoder.
            tokens: Tokens that enter the first layer.
            points: The layers after whose attention, or after which, tokens leave; 0-based, ascending.
            kept: Tokens left after each point.
            boundary: Whether they leave before a prune layer's output projection and MLP, or after it.

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
        """The schedule with so many tokens more that are never pruned, such as those of text."""
        return Schedule(tuple(n + tokens for n in self.entering), tuple(n + tokens for n in self.staying))

    def macs(self, layer: LayerWork) -> int:
        """MACs of all layers."""
        pairs = zip(self.entering, self.staying, strict=True)
        return sum(layer.before_deletion(n) + layer.after_deletion(left) for n, left in pairs)

    def cache_bytes(self, num_kv_heads: int, head_dim: int, item_size: int) -> int:
        """Bytes of keys and values after the prefill; each layer's cache holds what entered it.

        Args:
            num_kv_heads: Heads that have keys and values of their own.
            head_dim: Size of one.
            item_size: Bytes of a number, 2 for fp16.
        """
        return 2 * num_kv_heads * head_dim * item_size * sum(self.entering)


def patch_embedding_macs(shapes: Shapes) -> int:
    """MACs of the patch embedding of one image, a convolution whose stride is its size."""
    return shapes.vision_patches * shapes.patch_values * shapes.vision_hidden_size


def tower_macs(shapes: Shapes) -> int:
    """MACs of the vision tower's layers for one image, by F2; layers behind the feature do not run."""
    layer = LayerWork(shapes.vision_hidden_size, shapes.vision_intermediate_size, "F2")
    return shapes.vision_layers * layer.layer(shapes.vision_tokens)


def projector_macs(shapes: Shapes, tokens: int) -> int:
    """MACs of the projector for so many tokens."""
    return tokens * sum(inputs * outputs for inputs, outputs in shapes.projector)


def head_macs(shapes: Shapes) -> int:
    """MACs of the logits of one position, all that a prefill needs."""
    return shapes.hidden_size * shapes.vocab_size


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The visual tokens of a prompt, newline tokens included, on their way through a model.

    Attributes:
        tiles: That the vision tower encodes.
        projected: Tokens that go through the projector.
        entering: Tokens that enter the LLM.
        schedule: Those that each layer of it works on.
    """

    tiles: int
    projected: int
    entering: int
    schedule: Schedule


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
        num_layers: Of the decoder.
        before: What is pruned before the LLM.
        inside: What is pruned in it, if anything.
        tiling: How images become tiles, if they do.
        keep: Visual tokens kept of an image, or of each of its tiles, before the LLM.
        images: In the prompt.
        layer_ratio: Fraction left inside the LLM; the method's own if None.
        size: Height and width of the images where they are tiled; if None each fills the largest grid.

    Raises:
        InputError: An image that is too elongated for the model.
        UsageError: A ratio that is asked of a recipe, or is none.
    """
    shown = None if tiling is None else arrange(size or largest_size(tiling), tiling)
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
    )


@dataclass(frozen=True, slots=True)
class Saving:
    """One figure without pruning and with it."""

    unpruned: int
    pruned: int

    @property
    def removed(self) -> float:
        """The fraction saved, in [0, 1)."""
        return 1.0 - self.pruned / self.unpruned

    def describe(self, unit: str) -> str:
        """For people, such as '0.95 of 3.82 T MAC, 75.2% removed'."""
        digits = math.floor(math.log10(self.unpruned))
        power = min(4, digits // 3)
        decimals = max(0, 2 - (digits - 3 * power))
        pruned, unpruned = (f"{n / 1000**power:.{decimals}f}" for n in (self.pruned, self.unpruned))
        scale = f"{('', 'k', 'M', 'G', 'T')[power]} {unit}".strip()
        return f"{pruned} of {unpruned} {scale}, {100 * self.removed:.1f}% removed"


@dataclass(frozen=True, slots=True)
class Savings:
    """What a bundle's pruning saves of a prefill, in each scope.

    Attributes:
        convention: Of the decoder's layers; the tower's are counted by F2 always.
        unit: Of `visual`, `sequence` and `model`.
        images: In the prompt.
        visual_tokens: Of the prompt, before any pruning, newline tokens included. Where a model tiles its
            images, each of them fills the largest grid of tiles.
        text_tokens: Of the prompt.
        visual: The decoder, visual tokens alone.
        sequence: The decoder, visual and text tokens.
        model: That, and the vision tower, the projector, and the logits of the last position.
        cache_bytes: Keys and values of the visual tokens after the prefill.
    """

    convention: Convention
    unit: Unit
    images: int
    visual_tokens: int
    text_tokens: int
    visual: Saving
    sequence: Saving
    model: Saving
    cache_bytes: Saving


def savings(
    manifest: Manifest,
    *,
    images: int = 1,
    text_tokens: int = TEXT_TOKENS,
    keep_tokens: int | None = None,
    layer_ratio: float | None = None,
    convention: Convention | None = None,
    unit: Unit = "MAC",
) -> Savings | None:
    """What the pruning of a bundle saves, before the LLM and inside it.

    Args:
        manifest: Of the bundle.
        images: In the prompt.
        text_tokens: In the prompt.
        keep_tokens: Visual tokens kept of an image before the LLM; the bundle's own number if None.
        layer_ratio: Fraction left inside the LLM; the bundle's own if None.
        convention: For the decoder; what its MLP has if None.
        unit: MAC, or FLOP, which is half a MAC.

    Returns:
        None where the manifest does not know the shapes: it is older, or the decoder has experts.

    Raises:
        UsageError: Counts that the bundle cannot keep, or a ratio inside the LLM where nothing is pruned.
    """
    shapes, before, inside = manifest.shapes, manifest.pruning, manifest.layer_pruning
    if images < 1 or text_tokens < 0:
        raise UsageError(
            f"There is no prompt of {images} images and {text_tokens} text tokens.", "Give one image or more."
        )
    if inside is None and layer_ratio is not None:
        raise UsageError("This bundle prunes nothing inside the LLM.", "Leave the ratio out.")
    keep = before.budget.from_tokens(before.keep_tokens if keep_tokens is None else keep_tokens)
    if shapes is None:
        return None
    whole = before.budget.visual_tokens
    all_of_it = count_tokens(shapes.num_layers, before, None, manifest.tiling, keep=whole, images=images)
    found = count_tokens(
        shapes.num_layers, before, inside, manifest.tiling, keep=keep, images=images, layer_ratio=layer_ratio
    )
    full, schedule = all_of_it.schedule, found.schedule
    convention = convention or shapes.convention
    layer = LayerWork(shapes.hidden_size, shapes.intermediate_size, convention)
    around = found.tiles * (patch_embedding_macs(shapes) + tower_macs(shapes)) + head_macs(shapes)

    def model(schedule: Schedule, projected: int) -> int:
        return around + projector_macs(shapes, projected) + schedule.plus(text_tokens).macs(layer)

    def counted(unpruned: int, pruned: int) -> Saving:
        return Saving(in_unit(unpruned, unit), in_unit(pruned, unit))

    decoder = manifest.decoder
    cache = (decoder.num_kv_heads, decoder.head_dim, ITEM_SIZE[decoder.cache_dtype])
    return Savings(
        convention=convention,
        unit=unit,
        images=images,
        visual_tokens=all_of_it.entering,
        text_tokens=text_tokens,
        visual=counted(full.macs(layer), schedule.macs(layer)),
        sequence=counted(full.plus(text_tokens).macs(layer), schedule.plus(text_tokens).macs(layer)),
        model=counted(model(full, all_of_it.projected), model(schedule, found.projected)),
        cache_bytes=Saving(full.cache_bytes(*cache), schedule.cache_bytes(*cache)),
    )
