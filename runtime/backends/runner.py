"""The interface between the runtime and a backend that runs graphs.

A backend wraps one loaded graph in a `Runner`. The rest of the runtime passes values from graph to graph
without looking inside, so they stay where the backend left them, in host or in device memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from visprune.manifest import TensorSpec

__all__ = [
    "BackendOptions",
    "Croppable",
    "DeviceArray",
    "Ranked",
    "Runner",
    "Specs",
    "Value",
    "shape_of",
    "size_in_bytes",
    "to_numpy",
]


class DeviceArray(Protocol):
    """A tensor in a backend's own memory."""

    def shape(self) -> Any:
        """Return the dimensions."""

    def numpy(self) -> NDArray[Any]:
        """Return the content in host memory; a copy if it was elsewhere."""


@runtime_checkable
class Croppable(DeviceArray, Protocol):
    """Keys or values in a buffer that is written in place, so that they can be cropped without a copy.

    `shareable`: whether a copy of them in host memory is cheap, and another conversation can continue it.
    """

    shareable: bool

    def cropped(self, length: int) -> DeviceArray:
        """Return the first tokens, [1, Hkv, `length`, Dh]."""


@runtime_checkable
class Ranked(DeviceArray, Protocol):
    """Logits [1, 1, V] whose largest can be found without copying them to host memory."""

    def argmax(self) -> int:
        """Return the token id of the largest, the first of equals; -1 for NaN, +inf, or -inf only."""


Value: TypeAlias = NDArray[Any] | DeviceArray
"""A value that is passed between graphs: a host array, or an opaque array of the backend."""


@dataclass(frozen=True, slots=True)
class Specs:
    """Inputs and outputs of a graph, in its own order and under its own names.

    `cache_capacity`: most tokens in the cache of each of its layers; None: limited only by memory.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache_capacity: int | None = None


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """The user's choices about how graphs are run.

    Attributes:
        provider: Name in `backends.PROVIDERS`.
        threads: Processor threads for one graph.
        low_memory: Use less memory and more time. On the CPU, weights stay in their file with the dtype they
            have there, and are converted to float32 when they are used. Engines are loaded when they are
            used, and unloaded when others need their memory.
    """

    provider: str
    threads: int
    low_memory: bool = False


class Runner(Protocol):
    """One loaded graph."""

    @property
    def specs(self) -> Specs:
        """Inputs and outputs."""

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph.

        Args:
            feeds: A value for every input, by the graph's tensor names, in the dtypes of `specs`.

        Returns:
            Every output by its name, in the backend's own memory. It is valid as long as the object exists.
        """

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the graph's memory. The graph cannot run afterwards."""


def size_in_bytes(value: Value, dtype: str) -> int:
    """Return the bytes that a value of a dtype takes: of its whole buffer if it is written in place."""
    found = getattr(value, "nbytes", None)
    if found is not None:
        return int(found)
    return prod(shape_of(value)) * np.dtype(dtype).itemsize


def shape_of(value: Value) -> tuple[int, ...]:
    """Return the dimensions of a value."""
    return tuple(value.shape if isinstance(value, np.ndarray) else value.shape())


def to_numpy(value: Value) -> NDArray[Any]:
    """Return a value in host memory: itself if it is there already, otherwise a copy."""
    return value if isinstance(value, np.ndarray) else value.numpy()
