"""ONNX Runtime on the CPU with a cache that is written in place: graphs from `cache_rewrite`.

Keys and values of a conversation lie in buffers with room for more tokens. They are bound to the session
once, as inputs and as outputs, so that a step binds only what is new. When the room is used up, or another
conversation's cache comes, the tokens are copied to new buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visprune.cache_names import PAST, PRESENT
from visprune.runtime.backends.cache_rewrite import LENGTHS
from visprune.runtime.backends.ort import OrtRunner
from visprune.runtime.backends.runner import Specs, Value, shape_of, to_numpy

__all__ = ["HostCacheArray", "InPlaceRunner", "capacity_for"]


def capacity_for(tokens: int) -> int:
    """Return for how many tokens buffers are made when they must hold this many.

    The room grows with the number, so that all copies together cost little.
    """
    return tokens + max(32, tokens // 16)


class _Buffers:
    """The buffers of one conversation in one graph, and the binding that they are part of.

    Args:
        binding: An I/O binding of the session, to which the buffers are bound with all their names.
        arrays: By the name of the input, [1, Hkv, C, Dh].
    """

    def __init__(self, binding: Any, arrays: dict[str, NDArray[np.float32]]) -> None:
        self.binding = binding
        self.arrays = arrays
        self.capacity = min(array.shape[2] for array in arrays.values())


class HostCacheArray:
    """Keys or values of one layer, [1, Hkv, P, Dh], in a buffer that is written in place.

    The values of successive steps share one buffer, whose first P tokens they are.

    Args:
        buffers: The buffers of all layers of the conversation.
        name: Name of the input.
        length: P.
    """

    shareable = True
    """`numpy` is a cheap copy, which another conversation can continue."""

    def __init__(self, buffers: _Buffers, name: str, length: int) -> None:
        self.buffers = buffers
        self.length = length
        self._name = name

    @property
    def view(self) -> NDArray[np.float32]:
        """The tokens in the buffer, [1, Hkv, P, Dh]."""
        return self.buffers.arrays[self._name][:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffers.arrays[self._name].nbytes

    def shape(self) -> tuple[int, ...]:
        """Return [1, Hkv, P, Dh], the dimensions without the unused part of the buffer."""
        return self.view.shape

    def numpy(self) -> NDArray[np.float32]:
        """Return a copy of the tokens."""
        return np.ascontiguousarray(self.view)

    def cropped(self, length: int) -> HostCacheArray:
        """Return the first tokens, in the same buffer."""
        return HostCacheArray(self.buffers, self._name, length)


class InPlaceRunner(OrtRunner):
    """A session of a rewritten graph. Its interface is that of the standard graph.

    Args:
        ort: The module `onnxruntime`.
        session: The `InferenceSession`.
        graph: Name for messages.
    """

    def __init__(self, ort: ModuleType, session: Any, graph: str) -> None:
        super().__init__(ort, session, graph)
        inputs = tuple(spec for spec in self._specs.inputs if spec.name not in LENGTHS)
        self._specs = Specs(inputs, self._specs.outputs)
        self._present = {
            spec.name: spec.name.replace(PAST, PRESENT) for spec in inputs if spec.name.startswith(PAST)
        }
        caches = set(self._present.values())
        self._others = [spec.name for spec in self._specs.outputs if spec.name not in caches]

    def _run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        past = {name: feeds[name] for name in self._present}
        before = shape_of(next(iter(past.values())))[2]
        length = before + shape_of(feeds["position_ids"])[1]
        buffers = self._buffers(past, length)
        binding = buffers.binding
        new: dict[str, Value] = {name: value for name, value in feeds.items() if name not in past}
        new |= zip(LENGTHS, (np.array([number], np.int32) for number in (length - 1, length)), strict=True)
        inputs = {name: self._on_device(value) for name, value in new.items()}  # alive during the run
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._others:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        # The outputs come in the order in which they were first bound; `_buffers` begins with these.
        made: dict[str, Value] = dict(zip(self._others, binding.get_outputs(), strict=False))
        return made | {
            present: HostCacheArray(buffers, name, length) for name, present in self._present.items()
        }

    def _buffers(self, past: Mapping[str, Value], length: int) -> _Buffers:
        """Return buffers that hold the past and have room: those that hold it already, or new ones."""
        found = {value.buffers if isinstance(value, HostCacheArray) else None for value in past.values()}
        held = found.pop()
        if held is not None and not found and held.capacity >= length:
            return held
        binding = self._session.io_binding()
        for name in self._others:
            binding.bind_output(name, "cpu")
        arrays = {}
        for name, value in past.items():
            tokens = value.view if isinstance(value, HostCacheArray) else to_numpy(value)
            batch, heads, before, width = tokens.shape
            array = np.empty((batch, heads, capacity_for(length), width), np.float32)
            array[:, :, :before] = tokens
            bound = self._on_device(array)
            binding.bind_ortvalue_input(name, bound)
            binding.bind_ortvalue_output(self._present[name], bound)
            arrays[name] = array
        return _Buffers(binding, arrays)
