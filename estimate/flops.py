"""Savings of pruning in work, by formula: from a schedule of token counts, or from a bundle's manifest.

Papers print three scopes, and a figure means little without its scope:

    visual      the decoder's layers, as if the visual tokens were alone (n = visual tokens)
    sequence    the decoder's layers (n = visual + text tokens)
    model       the sequence, and the vision tower, the projector, and the logits of one position

All figures are of the prefill, in multiply-accumulates (MAC) by the formulas of `visprune.work`; a FLOP
count is twice that. As in print, norms, softmax, positions, biases and the selection itself do not count. As
in print, the whole attention matrix counts although half of it is masked, and keys and values count as if no
heads shared them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from visprune.errors import UsageError
from visprune.estimate.token_schedule import Schedule, TokenCounts, count_tokens
from visprune.units import ITEM_SIZE
from visprune.work import Convention, LayerWork, Shapes

if TYPE_CHECKING:
    from visprune.manifest import Manifest

__all__ = [
    "TEXT_TOKENS",
    "Saving",
    "Savings",
    "Schedule",
    "Unit",
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
    """Convert a number of MACs to a unit: one multiply-accumulate is two FLOP."""
    return macs * {"MAC": 1, "FLOP": 2}[unit]


def patch_embedding_macs(shapes: Shapes) -> int:
    """Return the MACs of the patch embedding of one image, a convolution whose stride is its kernel size."""
    return shapes.vision_patches * shapes.patch_values * shapes.vision_hidden_size


def tower_macs(shapes: Shapes) -> int:
    """Return the MACs of the vision tower for one image: its layers by F2, and what else it computes.

    Layers after the one that the features come from do not run, and do not count.
    """
    layer = LayerWork(shapes.vision_hidden_size, shapes.vision_intermediate_size, "F2")
    return shapes.vision_layers * layer.layer(shapes.vision_tokens) + shapes.vision_other.macs


def projector_macs(shapes: Shapes, tokens: int) -> int:
    """Return the MACs of the projector for a number of tokens."""
    return tokens * sum(inputs * outputs for inputs, outputs in shapes.projector)


def head_macs(shapes: Shapes) -> int:
    """Return the MACs of the logits of one position, which is all that a prefill needs."""
    return shapes.hidden_size * shapes.vocab_size


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
        """Return a text for people, such as '0.95 of 3.82 T MAC, 75.2% removed'."""
        digits = math.floor(math.log10(self.unpruned))
        power = min(4, digits // 3)
        decimals = max(0, 2 - (digits - 3 * power))
        pruned, unpruned = (f"{n / 1000**power:.{decimals}f}" for n in (self.pruned, self.unpruned))
        scale = f"{('', 'k', 'M', 'G', 'T')[power]} {unit}".strip()
        return f"{pruned} of {unpruned} {scale}, {100 * self.removed:.1f}% removed"


@dataclass(frozen=True, slots=True)
class Savings:
    """Savings of a bundle's pruning in a prefill, in each scope.

    Attributes:
        convention: How the decoder's layers are counted; those of the vision tower always by F2.
        unit: Unit of `visual`, `sequence` and `model`.
        images: Images in the prompt.
        visual_tokens: Visual tokens of the prompt before any pruning, newline tokens included. A model that
            tiles its images fills the largest grid of tiles with each.
        text_tokens: Text tokens of the prompt.
        visual: The decoder with the visual tokens alone.
        sequence: The decoder with visual and text tokens.
        model: The sequence, the vision tower, the projector, and the logits of the last position.
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
    """Compute the savings of a bundle's pruning, before the LLM and inside it.

    Args:
        manifest: The bundle's manifest.
        images: Images in the prompt.
        text_tokens: Text tokens in the prompt.
        keep_tokens: Visual tokens kept of an image before the LLM; the bundle's own number if None.
        layer_ratio: Fraction left inside the LLM; the bundle's own if None.
        convention: How the decoder is counted; if None, by the matrices that its MLP has.
        unit: MAC, or FLOP, which is half a MAC.

    Returns:
        None if the manifest does not have the model's shapes: it is older, or the decoder has experts.

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

    def model(counts: TokenCounts) -> int:
        seen = shapes.with_patches(counts.patches)
        tower = counts.tiles * (patch_embedding_macs(seen) + tower_macs(seen))
        decoder = counts.schedule.plus(text_tokens).macs(layer) + head_macs(shapes)
        return tower + projector_macs(shapes, counts.projected) + decoder

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
        model=counted(model(all_of_it), model(found)),
        cache_bytes=Saving(full.cache_bytes(*cache), schedule.cache_bytes(*cache)),
    )
