"""The seam between the runtime and whatever runs a graph.

A backend wraps one loaded graph in a `Runner`. Everything above this line passes values from graph to
graph without looking inside: they stay where the backend left them, in host or in device memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    "to_numpy",
]


class DeviceArray(Protocol):
    """A tensor of a backend, in its own memory."""

    def shape(self) -> Any:
        """The dimensions."""

    def numpy(self) -> NDArray[Any]:
        """The content in host memory; a copy where it was elsewhere."""


@runtime_checkable
class Croppable(DeviceArray, Protocol):
    """Keys or values that can be cut where they are."""

    def cropped(self, length: int) -> DeviceArray:
        """The first tokens, [1, Hkv, `length`, Dh]."""


@runtime_checkable
class Ranked(DeviceArray, Protocol):
    """Logits [1, 1, V] whose largest is known without them."""

    def argmax(self) -> int:
        """The token id of the largest, the first of equals; -1 with NaN or +inf, or only -inf."""


Value: TypeAlias = NDArray[Any] | DeviceArray
"""What flows between graphs: an array of the host, or an opaque one of the backend."""


@dataclass(frozen=True, slots=True)
class Specs:
    """What a graph takes and gives, in its own order and under its own names.

    `cache_capacity`: most tokens in the cache of each of its layers; None: limited only by memory.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache_capacity: int | None = None


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What a user may choose about how graphs are run.

    Attributes:
        provider: Name in `backends.PROVIDERS`.
        threads: Processor threads for one graph.
        low_memory: Slower, for less memory. On the CPU weights stay in their file, in the width they have
            there, and are widened as they are used; engines are loaded when they are used, and leave where
            others need their memory.
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
            Every output by name, in the backend's own memory, valid as long as it is held.
        """

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free what the graph holds; it cannot run after that."""


def to_numpy(value: Value) -> NDArray[Any]:
    """A value in host memory: itself if it is there, otherwise a copy."""
    return value if isinstance(value, np.ndarray) else value.numpy()
