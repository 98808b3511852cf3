"""Token ids and pictures through the graphs, with what the cache already holds left out.

A `Session` is the state of one conversation at the level of tokens: `prefill` takes the *whole* prompt
every time and feeds only what the cache does not hold, so that its state always equals that of a fresh
prefill of the same tokens. It knows no text and no chat template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visprune.bundle import Manifest
from visprune.errors import InputError, UnsupportedError
from visprune.runtime.executor import Execution, Executor
from visprune.runtime.kv_cache import KVCache
from visprune.runtime.runner import Value, to_numpy

__all__ = ["Picture", "Prefill", "Session", "check_positions", "context_limit"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One image as the vision encoder takes it.

    Attributes:
        pixels: [1, 3, H, W] float32.
        key: Digest of the pixels; two pictures with one key are the same to the model.
    """

    pixels: NDArray[np.float32]
    key: bytes

    @classmethod
    def of(cls, pixels: NDArray[np.float32]) -> Picture:
        """A picture with its digest."""
        return cls(pixels, hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest())


@dataclass(frozen=True, slots=True)
class Prefill:
    """What a prefill gives.

    Attributes:
        logits: Of the last position, [V], in the model's float.
        keep_indices: Kept visual tokens of each image that was encoded, ascending.
        timings_ms: Milliseconds of each stage, by graph.
    """

    logits: NDArray[np.floating]
    keep_indices: tuple[tuple[int, ...], ...]
    timings_ms: dict[str, float]


def context_limit(manifest: Manifest) -> int:
    """Most tokens that one sequence may have: the context, or the sliding window, which the graphs lack."""
    decoder = manifest.decoder
    return min(decoder.context_length, decoder.sliding_window or decoder.context_length)


class Session:
    """The cache of one conversation and the tokens it holds.

    Args:
        executor: Runs the stages.
        manifest: Of the bundle.
        keep_tokens: K for every image of the conversation.
    """

    def __init__(self, executor: Executor, manifest: Manifest, keep_tokens: int) -> None:
        self._executor = executor
        self._manifest = manifest
        self._keep_tokens = keep_tokens
        self._cache = KVCache(manifest.decoder)
        self._ids: list[int] = []  # one for each cached token
        self._placed: list[tuple[int, bytes]] = []  # where each cached image begins, and which it is
        self.image_length = keep_tokens + manifest.pruning.always_kept
        """Tokens that one image takes in the sequence."""
        self.limit = context_limit(manifest)

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return len(self._ids)

    def clear(self) -> None:
        """Forget everything."""
        self._crop(0)

    def check(self, ids: Sequence[int], pictures: Sequence[Picture]) -> None:
        """Refuse what `prefill` could not take.

        Raises:
            InputError: The prompt is longer than the model's context or sliding window, or has another
                number of placeholders than its pictures take.
        """
        if len(ids) > self.limit:
            raise _too_long(len(ids), len(pictures) * self._keep_tokens, self._manifest)
        self._image_starts(ids, len(pictures))

    def prefill(self, ids: Sequence[int], pictures: Sequence[Picture]) -> Prefill:
        """Bring the cache to hold exactly `ids`.

        Args:
            ids: The whole prompt, with `image_length` placeholders for each picture.
            pictures: All pictures of the prompt, in order.

        Raises:
            InputError: As for `check`. Nothing changes then.
        """
        self.check(ids, pictures)
        starts = self._image_starts(ids, len(pictures))
        keys = [picture.key for picture in pictures]
        kept = self._common(ids, list(zip(starts, keys, strict=True)))
        self._crop(kept)
        new = [picture for start, picture in zip(starts, pictures, strict=True) if start >= kept]
        # Places past the end of the cache are never looked at, so an interrupted run does no harm.
        self._placed = list(zip(starts, keys, strict=True))
        done = self._run(ids[kept:], new)
        return Prefill(self._logits(done), self._keep_indices(done, len(new)), done.timings_ms)

    def decode(self, token: int) -> NDArray[np.floating]:
        """Append one token; the logits that follow it, [V]."""
        return self._logits(self._run([token], []))

    def _run(self, ids: Sequence[int], pictures: Sequence[Picture]) -> Execution:
        past = len(self._ids)
        supplied: dict[str, Value] = {
            "input_ids": np.array([ids], dtype=np.int64),  # [1, S]
            "position_ids": np.arange(past, past + len(ids), dtype=np.int64)[None],  # [1, S]
            "keep_tokens": np.array(self._keep_tokens, dtype=np.int64),
            **self._cache.feeds(),
        }
        if pictures:
            supplied["pixel_values"] = np.concatenate(
                [picture.pixels for picture in pictures]
            )  # [T, 3, H, W]
        done = self._executor.run(supplied, visual=bool(pictures))
        self._cache.update(done.values)
        self._ids += ids
        return done

    def _image_starts(self, ids: Sequence[int], count: int) -> list[int]:
        places = [i for i, token in enumerate(ids) if token == self._manifest.text.image_token_id]
        if len(places) != count * self.image_length:
            raise InputError(
                f"The prompt has {len(places)} image placeholders where {count} images take "
                f"{count * self.image_length}.",
                "Do not write the image token in a prompt; give images as images.",
            )
        return places[:: self.image_length]

    def _common(self, ids: Sequence[int], images: Sequence[tuple[int, bytes]]) -> int:
        """How many cached tokens can stay: a prefix of `ids`, shorter than it, with no image cut in two."""
        count = 0
        # The last token is always fed, because its logits are wanted.
        for cached, wanted in zip(self._ids, ids[:-1], strict=False):
            if cached != wanted:
                break
            count += 1
        for index, (start, key) in enumerate(images):
            if start >= count:
                break
            same = index < len(self._placed) and self._placed[index] == (start, key)
            if not same or start + self.image_length > count:
                return start
        return count

    def _crop(self, length: int) -> None:
        self._cache.crop(length)
        self._ids = self._ids[:length]
        self._placed = [place for place in self._placed if place[0] + self.image_length <= length]

    def _logits(self, done: Execution) -> NDArray[np.floating]:
        logits: NDArray[np.floating] = to_numpy(done.values["logits"])[0, -1]
        return logits

    def _keep_indices(self, done: Execution, images: int) -> tuple[tuple[int, ...], ...]:
        if not images:
            return ()
        if "keep_indices" not in done.values:  # a bundle without a pruner keeps everything
            return (tuple(range(self._keep_tokens)),) * images
        return tuple(tuple(row) for row in to_numpy(done.values["keep_indices"]).tolist())


def _too_long(length: int, visual: int, manifest: Manifest) -> InputError:
    limit = context_limit(manifest)
    name = "context" if limit == manifest.decoder.context_length else "sliding window"
    return InputError(
        f"The prompt has {length} tokens, {visual} of them visual, and the model's {name} holds {limit}.",
        "Shorten the text, start a new conversation, give fewer images, or keep fewer visual tokens.",
    )


def check_positions(manifest: Manifest) -> None:
    """Refuse a bundle whose positions this runtime cannot number.

    Raises:
        UnsupportedError: Survivors keep their original positions.
    """
    if manifest.pruning.positions != "contiguous":
        raise UnsupportedError(
            f"The method {manifest.pruning.method!r} keeps original positions, which cannot be run yet.",
            "Export with a method that prunes before the LLM (see `visprune methods`).",
        )
