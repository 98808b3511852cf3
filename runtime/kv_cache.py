"""The key-value cache: keys and values of each layer, which the graph's outputs replace at each step.

The graphs append new tokens themselves, so nothing here copies but `crop`, which runs at most once a turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import numpy as np

from visprune.cache_names import PAST, PRESENT, past_names, present_names
from visprune.errors import BundleError
from visprune.manifest import Decoder, Manifest, TensorSpec
from visprune.runtime.backends.runner import Croppable, Value, shape_of, size_in_bytes, to_numpy

__all__ = ["KVCache", "check_cache"]


def check_cache(manifest: Manifest) -> None:
    """Refuse a bundle whose graphs have another cache than the manifest's `decoder` describes.

    Raises:
        BundleError: The graphs cache another number of layers, or a tensor has another dtype or shape.
    """
    decoder = manifest.decoder
    found = [(value, spec) for value, spec in _values(manifest) if value.startswith((PAST, PRESENT))]
    names = {value for value, _ in found}
    # Counted first: an altered file may name a huge number of layers, and the lists would fill the memory.
    if len(names) != 4 * decoder.num_layers or names != {*past_names(decoder), *present_names(decoder)}:
        raise BundleError(
            f"The bundle's graphs do not cache the {decoder.num_layers} layers that its decoder has.",
            "Export the model again.",
        )
    for value, spec in found:
        sizes = (spec.shape[1], spec.shape[3]) if len(spec.shape) == 4 else ()
        if spec.dtype != decoder.cache_dtype or sizes != (decoder.num_kv_heads, decoder.head_dim):
            raise BundleError(
                f"The cache {value!r} is {spec.dtype} {list(spec.shape)}, and the bundle's decoder has "
                f"{decoder.cache_dtype} [1, {decoder.num_kv_heads}, P, {decoder.head_dim}].",
                "Export the model again.",
            )


def _values(manifest: Manifest) -> Iterator[tuple[str, TensorSpec]]:
    """Yield each value that a stage reads or assigns, with its spec."""
    for stage in manifest.stages:
        graph = manifest.graphs[stage.graph]
        for names, specs in ((stage.inputs, graph.inputs), (stage.outputs, graph.outputs)):
            yield from ((names[spec.name], spec) for spec in specs if spec.name in names)


class KVCache:
    """Keys and values of all layers, each [1, Hkv, P, Dh].

    Args:
        decoder: The manifest's decoder, which has the number of layers and their shapes. The cache starts
            empty, with P = 0.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._past = past_names(decoder)
        self._present = present_names(decoder)
        shape = (1, decoder.num_kv_heads, 0, decoder.head_dim)
        self._dtype = decoder.cache_dtype
        self._empty = np.zeros(shape, dtype=self._dtype)
        self._values: list[Value] = []
        self.clear()

    @property
    def lengths(self) -> tuple[int, ...]:
        """P of each layer. All are equal unless tokens are pruned inside the LLM."""
        return tuple(shape_of(value)[2] for value in self._values[::2])

    @property
    def shareable(self) -> bool:
        """Whether `copy` works, and is cheap."""
        return all(not isinstance(value, Croppable) or value.shareable for value in self._values)

    @property
    def nbytes(self) -> int:
        """Bytes of all values; of the whole buffer where a backend writes in place."""
        return sum(size_in_bytes(value, self._dtype) for value in self._values)

    def copy(self) -> KVCache:
        """Return a cache that begins with the same values; copies of those that are written in place."""
        other = copy(self)
        other._values = [to_numpy(value) if isinstance(value, Croppable) else value for value in self._values]
        return other

    def feeds(self) -> dict[str, Value]:
        """Return the past keys and values, by value name."""
        return dict(zip(self._past, self._values, strict=True))

    def update(self, outputs: Mapping[str, Value]) -> None:
        """Keep the keys and values that a step gave, as the past of the next one."""
        self._values = [outputs[name] for name in self._present]

    def clear(self) -> None:
        """Forget everything."""
        self._values = [self._empty] * len(self._past)

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep only the first tokens of each layer.

        Args:
            lengths: Number of tokens to keep, by layer.
        """
        if not any(lengths):
            self.clear()
            return
        for index, value in enumerate(self._values):
            length = lengths[index // 2]
            if length >= shape_of(value)[2]:
                continue
            if isinstance(value, Croppable):
                self._values[index] = value.cropped(length)
            else:
                # Through host memory, because that needs no operator of the backend, and it happens at most
                # once a turn. The copy frees the rest of the buffer.
                self._values[index] = np.ascontiguousarray(to_numpy(value)[:, :, :length])
