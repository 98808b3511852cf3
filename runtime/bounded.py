"""A cache with a bound on the bytes of its entries. The entry that was unused for longest leaves first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["BoundedCache"]

K = TypeVar("K")
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """Values by key, with the bytes that each takes.

    Args:
        limit: The most bytes of all values together; with 0 nothing is kept.

    Attributes:
        limit: As given.
        bytes: Bytes of all values.
        hits: Number of lookups that found a value.
        misses: Number of lookups that found none.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = self.hits = self.misses = 0
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def items(self) -> list[tuple[K, V]]:
        """Return all keys and values, the one that was unused for longest first."""
        return [(key, value) for key, (value, _) in self._held.items()]

    def get(self, key: K) -> V | None:
        """Return a value and count it as used; None if there is none."""
        if key not in self._held:
            self.misses += 1
            return None
        self.hits += 1
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep a value of so many bytes, in the place of an earlier one. Too large a value is not kept."""
        self.remove(key)
        if size > self.limit:
            return
        self._held[key] = (value, size)
        self.bytes += size
        while self.bytes > self.limit:
            self.remove(next(iter(self._held)))

    def remove(self, key: K) -> None:
        """Forget a value, if it is there."""
        if key in self._held:
            self.bytes -= self._held.pop(key)[1]

    def clear(self) -> None:
        """Forget all values."""
        self._held.clear()
        self.bytes = 0
