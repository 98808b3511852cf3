"""Optimisation profiles: the smallest, the usual and the largest size of each input of each graph.

They follow from the manifest and three limits. Dimensions are the letters of the manifest (see the glossary
in `docs/bundle.md`). Counts that a graph takes as an input (`keep_tokens`, `image_tokens`) have ranges of
values. The usual numbers all come from one prompt, so that TensorRT tunes for shapes that occur together: the
largest image, pruned as the bundle is by default, and 64 tokens of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from visprune.cache_names import PAST
from visprune.errors import BundleError, UnsupportedError, UsageError
from visprune.manifest import EngineProfile, Graph, InputRange, Manifest, Stage
from visprune.runtime.vision.arrangement import arrange, largest_size
from visprune.runtime.vision.kept_tokens import Keep
from visprune.tiling import Tiling

__all__ = ["TOPK_LIMIT", "Limits", "capacities", "profiles", "resolve_limits"]

TOPK_LIMIT = 3840
"""The largest K of TensorRT's TopK."""

_USUAL_TEXT = 64  # text tokens of a usual prompt
_USUAL_QUESTION = 16  # tokens of a usual question
_LONGEST_TEXT = 512  # text tokens of the longest prompt, and tokens generated after it, by default
# Most tokens of a decoding step. With 1, TensorRT-RTX would store the weights twice, in a layout for single
# tokens and in that of the prefill, and the engine would be twice as large.
_STEP_TOKENS = 2
_CACHE_MULTIPLE = 8  # cache sizes are multiples of it, so that rows of the mask are aligned for Tensor Cores
_MOST_OVER_MAX_TILES = 1.21  # an image's grid may exceed max_tiles by this factor before it is resampled

Bounds = tuple[int, int, int]
"""The least, the usual and the greatest value of a dimension or a count."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest inputs that an engine must take. `resolve_limits` replaces None by a number.

    Attributes:
        max_images: New images in one prefill.
        max_prompt: New tokens in one prefill, including those of images.
        max_cache: Tokens of a whole conversation, including answers.

    Raises:
        UsageError: A number is below 1, or a prompt is longer than the cache.
    """

    max_images: int = 1
    max_prompt: int | None = None
    max_cache: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_images", "max_prompt", "max_cache"):
            value = getattr(self, name)
            if value is None and name != "max_images":
                continue
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} is {value}.", "Give a whole number of at least 1.")
        if self.max_prompt and self.max_cache and self.max_prompt > self.max_cache:
            raise UsageError(
                f"A prompt of {self.max_prompt} tokens does not fit into a cache of {self.max_cache}.",
                "Give a larger --max-cache, or a smaller --max-prompt.",
            )


@dataclass(frozen=True, slots=True)
class _PictureBounds:
    """Bounds of one image: of the inputs of its stages, and of `tokens`, its length in the sequence."""

    tiles: Bounds
    keep: Bounds
    newlines: Bounds
    mixed: Bounds
    tokens: Bounds


def resolve_limits(manifest: Manifest, limits: Limits) -> Limits:
    """Return the limits with a number for each.

    By default a prompt may have its images unpruned and 512 tokens of text, and 512 tokens may follow. It
    is less if the context is shorter, or if graphs select tokens of the prompt and TensorRT's TopK cannot
    select more.

    Raises:
        UsageError: A limit is beyond the context, or too small for the bundle's own pruning.
        UnsupportedError: A graph could select more tokens than TensorRT's TopK can.
    """
    context = manifest.decoder.context_limit
    for name in ("max_prompt", "max_cache"):
        value = getattr(limits, name)
        if value is not None and value > context:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is {value}, and the model's context holds {context} tokens.",
                f"Give at most {context}.",
            )
    picture = _picture_bounds(manifest)
    ceiling = min(context, limits.max_cache or context)
    longest = limits.max_images * picture.tokens[2] + _LONGEST_TEXT
    if _limited_by_prompt(manifest):
        longest = min(longest, TOPK_LIMIT)
    prompt = limits.max_prompt or min(ceiling, longest)
    if prompt < picture.tokens[1] + 1:
        raise UsageError(
            f"A prompt of {prompt} tokens cannot hold a picture, of which this bundle keeps "
            f"{picture.tokens[1]}.",
            "Give a larger --max-prompt and --max-cache, or export with fewer visual tokens.",
        )
    found = replace(
        limits, max_prompt=prompt, max_cache=limits.max_cache or min(context, prompt + _LONGEST_TEXT)
    )
    _check_topk(manifest, picture, prompt)
    return found


def capacities(manifest: Manifest, limits: Limits) -> dict[str, int]:
    """Return how many tokens each layer of a decoder graph can hold if its cache is written in place.

    Before the first prune point inside the LLM it is max_cache. After each point it is less by the tokens
    that the bundle's own pruning removes from max_images images of the usual size, or from as many as fit.
    It is rounded up to a multiple of 8.

    So later layers cannot hold as many tokens as earlier ones. Such an engine refuses a conversation of
    nearly max_cache tokens that has fewer images and more text, smaller images, or a larger ratio inside
    the LLM than the bundle's own. If nothing is pruned inside the LLM, all layers hold max_cache.

    Args:
        manifest: Manifest of the bundle.
        limits: Limits as the user gave them.

    Returns:
        Capacity C of each graph that has a cache, by graph.

    Raises:
        UsageError, UnsupportedError: As for `resolve_limits`.
    """
    limits = resolve_limits(manifest, limits)
    cache, visual = limits.max_cache or 1, _picture_bounds(manifest).tokens[1]
    entering = visual * min(limits.max_images, cache // visual)
    left = manifest.layer_pruning.budget.kept(entering) if manifest.layer_pruning else ()
    found: dict[str, int] = {}
    removed = points = 0
    for stage in manifest.stages:
        if f"keep_tokens.{points}" in stage.inputs.values():
            removed = entering - left[points]
            points += 1
        if _has_cache(manifest.graphs[stage.graph]):
            found[stage.graph] = -(-(cache - removed) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    return found


def _has_cache(graph: Graph) -> bool:
    """Return whether a graph takes keys and values of earlier tokens."""
    return any(spec.name.startswith(PAST) for spec in graph.inputs)


def profiles(
    manifest: Manifest, limits: Limits, *, in_place: bool = False
) -> dict[str, tuple[EngineProfile, ...]]:
    """Return the profiles of each graph; none for a graph whose inputs do not vary.

    Args:
        manifest: Manifest of the bundle.
        limits: Limits as the user gave them.
        in_place: Whether caches are written in place. They are then buffers of `capacities`, which do not
            vary.

    Raises:
        UsageError, UnsupportedError: As for `resolve_limits`.
        BundleError: A graph has a dimension whose range is unknown.
    """
    limits = resolve_limits(manifest, limits)
    prompt, cache = limits.max_prompt or 1, limits.max_cache or 1
    rooms = capacities(manifest, limits) if in_place else {}
    picture = _picture_bounds(manifest)
    visual = picture.tokens[1]
    left = manifest.layer_pruning.budget.kept(visual) if manifest.layer_pruning else ()
    most_visual = min(limits.max_images * picture.tokens[2], prompt)
    common: dict[str, Bounds] = {
        "B": (1, 1, 1),
        "T": picture.tiles,
        "R": picture.newlines,
        "J": picture.mixed,
        "M": (0, min(visual, most_visual), most_visual),
        "Q": _clip((1, _USUAL_QUESTION, prompt), prompt),
        "K": picture.keep,
        **_resized_bounds(manifest),
        "keep_tokens": _clip(picture.keep, prompt),
        "image_tokens": _clip(picture.tokens, prompt),
    }
    found: dict[str, tuple[EngineProfile, ...]] = {}
    entering, points = visual, 0
    for stage in manifest.stages:
        text = min(_USUAL_TEXT, prompt - visual)
        length = text + entering
        if f"keep_tokens.{points}" in stage.inputs.values():
            entering = left[points]
            common[f"keep_tokens.{points}"] = (1, text + entering, prompt)
            points += 1
        graph = manifest.graphs[stage.graph]
        new = _clip((1, length, prompt), rooms.get(stage.graph, prompt))
        ranges = {**common, "S": new}
        if not _has_cache(graph):
            made = [_profile("all", stage, graph, ranges)]
        else:
            ranges["P"] = (0, 0, cache - 1)
            past = min(length, cache - 1)
            step = {**ranges, "S": (1, 1, min(_STEP_TOKENS, new[2])), "P": (0, past, cache - 1)}
            if in_place:
                graph = replace(graph, inputs=tuple(s for s in graph.inputs if not s.name.startswith(PAST)))
            made = [_profile("prefill", stage, graph, ranges), _profile("decode", stage, graph, step)]
        # A graph that runs at several prune points gets the ranges of the first, which are the largest.
        found.setdefault(stage.graph, tuple(one for one in made if one.inputs))
    return found


def _profile(
    name: Literal["all", "prefill", "decode"], stage: Stage, graph: Graph, ranges: Mapping[str, Bounds]
) -> EngineProfile:
    """Return a profile with the ranges of the inputs of one graph that vary."""
    inputs = {}
    for spec in graph.inputs:
        value = stage.inputs[spec.name]
        if not spec.shape and value in ranges:
            least, usual, most = ranges[value]
            inputs[spec.name] = InputRange((least,), (usual,), (most,))
            continue
        unknown = [d for d in spec.shape if isinstance(d, str) and d not in ranges]
        if unknown or not spec.shape:
            raise BundleError(
                f"Nothing says how large {unknown[0] if unknown else 'the value'} of {spec.name} in "
                f"{stage.graph} can be.",
                "Export again with this visprune.",
            )
        if any(isinstance(d, str) for d in spec.shape):
            rows = [(d, d, d) if isinstance(d, int) else ranges[d] for d in spec.shape]
            inputs[spec.name] = InputRange(*zip(*rows, strict=True))
    return EngineProfile(name, inputs)


def _picture_bounds(manifest: Manifest) -> _PictureBounds:
    """Return the bounds of one image of any size. The usual one fills the largest pinpoint."""
    pruning, tiling = manifest.pruning, manifest.tiling
    budget, beside = pruning.budget, pruning.always_kept
    if tiling is None:
        least = budget.minimum * budget.unit_tokens if budget.prunable else budget.visual_tokens
        keep = (least, pruning.keep_tokens, budget.visual_tokens)
        tokens = (keep[0] + beside, keep[1] + beside, keep[2] + beside)
        return _PictureBounds((1, 1, 1), keep, (0, 0, 0), (1, 1, 1), tokens)
    shown = arrange(largest_size(tiling), pruning.arranged(tiling, pruning.keep_tokens) or tiling)
    request = Keep(pruning.keep_tokens)
    number = request.counts(pruning, shown)[0]
    sizes = [(h // tiling.tile_size, w // tiling.tile_size) for h, w in tiling.pinpoints]
    visual = max(_visual_tokens(rows, columns, tiling) for rows, columns in sizes)
    newlines = max(rows for rows, _ in sizes) * tiling.side
    keep = (
        (1, number, visual) if budget.scope == "image" else (budget.unit_tokens, number, budget.visual_tokens)
    )
    usual = request.sequence_length(pruning, shown)
    tiles, mixed = 1 + max(rows * columns for rows, columns in sizes), 4
    if tiling.frame_pooling is not None:  # frames with as many tokens as the largest image
        tiles = max(tiles, visual // (tiling.side // tiling.frame_pooling) ** 2)
        mixed = tiling.frame_pooling**2
    return _PictureBounds(
        (1, shown.tiles, tiles),
        keep,
        (0, len(shown.newline_places), newlines),
        (1, shown.sources.shape[-1], mixed),
        (1 + beside, usual, max(usual, visual + newlines + beside)),
    )


def _resized_bounds(manifest: Manifest) -> dict[str, Bounds]:
    """Return the bounds of pixels and of the tower's tokens, if images are made smaller before it."""
    pruning, most = manifest.pruning, manifest.pruning.budget.visual_tokens
    if pruning.resizing is None:
        return {}
    whole = pruning.resizing.image_size
    small, usual = (pruning.smaller_image(count) or whole for count in (1, pruning.keep_tokens))
    pixels = (small, usual, whole)
    beside = pruning.always_kept
    return {"H": pixels, "W": pixels, "N": (1 + beside, pruning.keep_tokens + beside, most + beside)}


def _visual_tokens(rows: int, columns: int, tiling: Tiling) -> int:
    """Return the most visual tokens that an image in a pinpoint of rows x columns tiles can have."""
    tile = tiling.side**2
    tiles: float = rows * columns
    if tiling.max_tiles is not None:
        tiles = min(tiles, _MOST_OVER_MAX_TILES * tiling.max_tiles)
    return tile + int(tiles * tile)


def _clip(numbers: Bounds, most: int) -> Bounds:
    """Limit bounds: an image has no more tokens than its prompt, and a prompt no more than the cache."""
    return (min(numbers[0], most), min(numbers[1], most), min(numbers[2], most))


def _limited_by_prompt(manifest: Manifest) -> bool:
    """Return whether only the length of the prompt limits how many tokens a graph selects."""
    return manifest.layer_pruning is not None or manifest.tiling is not None


def _check_topk(manifest: Manifest, picture: _PictureBounds, prompt: int) -> None:
    """Refuse limits with which a graph could select more tokens than TensorRT's TopK can."""
    values = {value for stage in manifest.stages for value in stage.inputs.values()}
    choices = {"keep_tokens": picture.keep[2], "image_tokens": picture.tokens[2]}
    counts = {name: min(most, prompt) for name, most in choices.items() if name in values}
    if manifest.layer_pruning is not None:
        counts["keep_tokens.0"] = prompt  # text included
    name = max(counts, key=lambda one: counts[one], default=None)
    if name is not None and counts[name] > TOPK_LIMIT:
        raise UnsupportedError(
            f"{name} can be {counts[name]}, and TensorRT's TopK chooses at most {TOPK_LIMIT}.",
            f"Give --max-prompt {TOPK_LIMIT} or less.",
        )
