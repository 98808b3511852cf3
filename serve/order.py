"""The order in which conversations compute their tokens.

1. A conversation whose first token is due goes first. Several go in the order of their arrival.
2. Before the next first token, every conversation that was decoding when the last one began computes a token.
   So, however many requests arrive, a running answer waits between two of its tokens for at most one first
   token (a prefill) and one token of each other conversation.
3. Otherwise those that are decoding take turns, one token each.

This module knows nothing of models, threads and time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["Order"]

T = TypeVar("T")


class Order(Generic[T]):
    """Active conversations in the order of their turns. Any object that can be hashed stands for one."""

    def __init__(self) -> None:
        self._first: deque[T] = deque()  # their first token is due
        self._decoding: deque[T] = deque()
        self._owed: set[T] = set()  # those that compute a token before the next first token

    def __len__(self) -> int:
        return len(self._first) + len(self._decoding)

    def __iter__(self) -> Iterator[T]:
        yield from self._first
        yield from self._decoding

    def add(self, item: T) -> None:
        """Add a conversation, whose first token is due."""
        self._first.append(item)

    def next(self) -> T:
        """Return the conversation that computes the next token. There must be one."""
        if self._first and not self._owed:
            self._owed = set(self._decoding)
            item = self._first.popleft()
        else:
            item = self._decoding.popleft()
            self._owed.discard(item)
        self._decoding.append(item)
        return item

    def remove(self, item: T) -> None:
        """Remove a conversation that has ended."""
        (self._first if item in self._first else self._decoding).remove(item)
        self._owed.discard(item)
