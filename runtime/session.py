"""Prefill and decode of one conversation: token ids and pictures go through the graphs, logits come out.

A `Session` is the state of a conversation at the level of tokens. `prefill` takes the *whole* prompt every
time and feeds only the tokens that the cache does not hold, so that the state always equals that of a new
session after the same prompt. It knows neither text nor chat templates; `History` records the cached tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import accumulate
from math import inf

import numpy as np
from numpy.typing import NDArray

from visprune.cache_names import present_names
from visprune.errors import InputError
from visprune.manifest import Manifest
from visprune.runtime.backends.runner import Ranked, Runner, Value, to_numpy
from visprune.runtime.executor import Execution, Executor
from visprune.runtime.history import History, Image
from visprune.runtime.kv_cache import KVCache
from visprune.runtime.prefill import ImageTokens, Prefill
from visprune.runtime.vision.kept_tokens import Keep, merged_patches
from visprune.runtime.vision.pictures import Picture

__all__ = ["Session", "cache_capacities", "session_values"]


def session_values(manifest: Manifest) -> list[str]:
    """Return the names of the values that a session takes from the program."""
    points = len(manifest.layer_pruning.layers) if manifest.layer_pruning else 0
    names = ["logits", "keep_indices", "merge_weights", *(f"keep_indices.{k}" for k in range(points))]
    return names + present_names(manifest.decoder)


def cache_capacities(manifest: Manifest, runners: Mapping[str, Runner]) -> tuple[float, ...]:
    """Return the most tokens that the caches of each group of layers can hold.

    The groups are the layers up to each prune point inside the LLM, and those after the last one.

    Args:
        manifest: Manifest of the bundle.
        runners: Runners by graph.

    Returns:
        The smallest capacity among the graphs of each group; infinity if only memory limits it.
    """
    points = manifest.layer_pruning.layers if manifest.layer_pruning else ()
    found = [inf] * (len(points) + 1)
    for stage in manifest.stages:
        capacity = runners[stage.graph].specs.cache_capacity
        present = [value for value in stage.outputs.values() if value.startswith("present.")]
        for layer in (int(value.split(".")[1]) for value in present if capacity is not None):
            group = bisect_left(points, layer)
            found[group] = min(found[group], capacity or inf)
    return tuple(found)


class Session:
    """The cache of one conversation and the tokens it holds.

    Args:
        executor: Executor of the bundle's stages.
        manifest: Manifest of the bundle.
        keep: How many visual tokens are kept of every image.
        cache_capacities: From the function of this name; empty if nothing limits the layers.
    """

    def __init__(
        self, executor: Executor, manifest: Manifest, keep: Keep, cache_capacities: Sequence[float] = ()
    ) -> None:
        self._executor = executor
        self._manifest = manifest
        self._keep = keep
        self._cache = KVCache(manifest.decoder)
        self._images: list[tuple[Image, ImageTokens]] = []
        self._points = manifest.layer_pruning.layers if manifest.layer_pruning else ()
        self._history = History(len(self._points))
        self._capacities = tuple(cache_capacities) or (inf,) * (len(self._points) + 1)
        self.limit = int(min(manifest.decoder.context_limit, self._capacities[0]))

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return len(self._history.ids)

    @property
    def full(self) -> bool:
        """Whether no token can be appended: the context is used up, or the cache of some layers is full."""
        held = self._history.held
        return self.length >= self.limit or any(
            len(h) >= r for h, r in zip(held, self._capacities, strict=True)
        )

    @property
    def keep(self) -> Keep:
        """How many visual tokens are kept of every image."""
        return self._keep

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self._cache.nbytes

    @property
    def shareable(self) -> bool:
        """Whether `fork` works with this backend."""
        return self._cache.shareable

    def fork(self) -> Session:
        """Return a session that holds the same tokens. Both go on independently and share memory."""
        other = copy(self)
        other._cache, other._history = self._cache.copy(), self._history.copy()
        other._images = list(self._images)
        return other

    def shared(self, ids: Sequence[int], pictures: Sequence[Picture]) -> int:
        """Return how many tokens of a prompt need not be fed, for the answer that a new session gives.

        Inside the LLM, the tokens of an image were chosen by the prompt that it was fed with. A new session
        chooses by the whole prompt, so such an image cannot be shared.

        Args:
            ids: The whole prompt, which `check` does not refuse.
            pictures: Its pictures.
        """
        images = self._placed(ids, pictures)
        shared = self._history.shared(ids, images)
        return 0 if self._points and any(image.start < shared for image in images) else shared

    def continues(self, other: Session) -> bool:
        """Return whether this session holds all tokens and images that another one holds."""
        return self._keep == other._keep and self._history.continues(other._history)

    def clear(self) -> None:
        """Forget everything."""
        self._history.crop(0)
        self._cache.clear()
        self._images = []

    def image_length(self, picture: Picture) -> int:
        """Return the number of tokens that an image takes in the sequence."""
        return self._keep.sequence_length(self._manifest.pruning, picture.arrangement)

    def check(self, ids: Sequence[int], pictures: Sequence[Picture]) -> None:
        """Refuse a prompt that `prefill` could not take.

        Raises:
            InputError: The prompt is longer than the model's context or sliding window or the cache of the
                engines, or has another number of placeholders than its pictures take.
        """
        if len(ids) > self.limit:
            visual = sum(map(self.image_length, pictures))
            raise _too_long(len(ids), visual, self._manifest, self.limit)
        self._image_starts(ids, pictures)

    def prefill(self, ids: Sequence[int], pictures: Sequence[Picture]) -> Prefill:
        """Make the cache hold exactly the prompt, and return the logits that follow it.

        Args:
            ids: The whole prompt, with `image_length` placeholders for each picture.
            pictures: All pictures of the prompt, in order.

        Raises:
            InputError: As for `check`; the cache does not change then. Or more tokens are left after a prune
                point inside the LLM than the engines' cache can hold; then the cache keeps the tokens that it
                shares with the prompt.
        """
        self.check(ids, pictures)
        images = self._placed(ids, pictures)
        kept = self._history.rewind(ids, images)
        self._images = [(image, tokens) for image, tokens in self._images if image.end <= kept]
        layers = range(self._manifest.decoder.num_layers)
        self._cache.crop([len(self._history.held[bisect_left(self._points, layer)]) for layer in layers])
        new = [(image, p) for image, p in zip(images, pictures, strict=True) if image.start >= kept]
        entering = sum(image.length for image, _ in new)
        done = self._run(ids[kept:], [picture for _, picture in new], entering)
        self._images += [
            (image, self._image_tokens(image, picture, own))
            for (image, picture), own in zip(new, done.images, strict=True)
        ]
        tokens = tuple(own for _, own in self._images)
        return Prefill(
            self._logits(done),
            tokens[len(tokens) - len(new) :],
            tokens[: len(tokens) - len(new)],
            done.images_cached,
            kept,
            done.timings_ms,
        )

    def decode(self, token: int) -> NDArray[np.floating] | Ranked:
        """Append one token, and return the logits that follow it, as in `Prefill`."""
        return self._logits(self._run([token]))

    def _run(self, ids: Sequence[int], pictures: Sequence[Picture] = (), entering: int = 0) -> Execution:
        """Append tokens, `entering` of which are placeholders of new pictures."""
        supplied: dict[str, Value] = {
            "input_ids": np.array([ids], dtype=np.int64),  # [1, S]
            "position_ids": _positions(self.length, len(ids)),
            **self._prune_point_inputs(len(ids), entering),
            **self._cache.feeds(),
        }
        done = self._executor.run(
            supplied, [self._keep.feeds(self._manifest.pruning, picture) for picture in pictures]
        )
        self._cache.update(done.values)
        names = [f"keep_indices.{k}" for k in range(len(self._points))] if pictures else []
        self._history.extend(ids, [to_numpy(done.values[name])[0].tolist() for name in names])
        return done

    def _prune_point_inputs(self, length: int, entering: int) -> dict[str, Value]:
        """Return the number of tokens to keep at each prune point inside the LLM, and renumbered positions.

        Raises:
            InputError: More tokens are left after a point than the engines' cache can hold.
        """
        inside = self._manifest.layer_pruning
        if inside is None:
            return {}
        kept = self._keep.in_layers(self._manifest, entering) or (0,) * len(self._points)
        left = [length - entering + count for count in kept]  # text included
        for held, new, room in zip(self._history.held[1:], left, self._capacities[1:], strict=True):
            if len(held) + new > room:
                raise _over_capacity(len(held) + new, int(room), "after a prune point")
        values: dict[str, Value] = {f"keep_tokens.{k}": np.array(n, np.int64) for k, n in enumerate(left)}
        if inside.positions == "renumbered":
            for k, count in enumerate(left):
                values[f"position_ids.{k + 1}"] = _positions(len(self._history.held[k + 1]), count)
        return values

    def _image_starts(self, ids: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
        """Return the index of each picture's first placeholder.

        Raises:
            InputError: The prompt has another number of placeholders than its pictures take.
        """
        places = [i for i, token in enumerate(ids) if token == self._manifest.text.image_token_id]
        ends = list(accumulate(map(self.image_length, pictures), initial=0))
        if len(places) != ends[-1]:
            raise InputError(
                f"The prompt has {len(places)} image placeholders, and its {len(pictures)} images take "
                f"{ends[-1]}.",
                "Give as many placeholders as the images take.",
            )
        return [places[end] for end in ends[:-1]]

    def _placed(self, ids: Sequence[int], pictures: Sequence[Picture]) -> list[Image]:
        """Return the places of the pictures of a prompt."""
        starts = self._image_starts(ids, pictures)
        return [Image(s, self.image_length(p), p.key) for s, p in zip(starts, pictures, strict=True)]

    def _logits(self, done: Execution) -> NDArray[np.floating] | Ranked:
        value = done.values["logits"]
        return value if isinstance(value, Ranked) else to_numpy(value)[0, -1]

    def _image_tokens(self, image: Image, picture: Picture, values: Mapping[str, Value]) -> ImageTokens:
        """Return the tokens of a new image, from the values that its stages gave."""
        pruning = self._manifest.pruning
        indices = to_numpy(values["keep_indices"]) if "keep_indices" in values else None
        tokens, offsets = self._keep.chosen(pruning, picture.arrangement, indices)
        left = np.ones(len(tokens), dtype=bool)
        if self._points:
            left = np.isin(offsets + image.start, self._history.held[-1])
        merged = np.array([], dtype=np.int64)
        if indices is not None and "merge_weights" in values:
            weights = to_numpy(values["merge_weights"])
            merged = merged_patches(pruning, picture.arrangement, indices, weights, left)
        whole = pruning.budget.visual_tokens if picture.visual_tokens is None else picture.visual_tokens
        kept = tuple(tokens[left].tolist())
        return ImageTokens(kept, tuple(merged.tolist()), whole, self._by_layer(image))

    def _by_layer(self, image: Image) -> tuple[int, ...]:
        """Return how many tokens of an image entered each layer; nothing if all layers hold the same."""
        if not self._points:
            return ()
        held = [bisect_left(h, image.end) - bisect_left(h, image.start) for h in self._history.held]
        layers = range(self._manifest.decoder.num_layers)
        return tuple(held[bisect_left(self._points, layer)] for layer in layers)


def _positions(start: int, count: int) -> NDArray[np.int64]:
    """Return consecutive positions from `start`, [1, count]."""
    return np.arange(start, start + count, dtype=np.int64)[None]


def _too_long(length: int, visual: int, manifest: Manifest, limit: int) -> InputError:
    if limit < manifest.decoder.context_limit:
        return _over_capacity(length, limit, f"{visual} of them visual")
    name = "context" if limit == manifest.decoder.context_length else "sliding window"
    return InputError(
        f"The prompt has {length} tokens, {visual} of them visual, and the model's {name} holds {limit}.",
        "Shorten the text, start a new conversation, give fewer images, or keep fewer visual tokens.",
    )


def _over_capacity(length: int, room: int, which: str) -> InputError:
    return InputError(
        f"The conversation has {length} tokens, {which}, and the engines have room for {room}.",
        "Shorten the text, start a new conversation, keep fewer visual tokens, or build engines with a "
        "larger --max-cache (visprune-build).",
    )
