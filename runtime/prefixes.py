"""The caches of earlier conversations, so that a prompt which begins like one of them is not computed again.

The one that shares most tokens with a prompt is used. Which tokens of an image were kept is part of a cache,
so only conversations that keep equally many are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from visprune.runtime.bounded import BoundedCache
from visprune.runtime.session import Session
from visprune.runtime.vision.pictures import Picture

__all__ = ["Prefixes"]


class Prefixes:
    """Sessions of conversations that are not running.

    Args:
        limit: The most bytes of all caches; with 0 nothing is kept. Memory that two of them share counts
            twice.
    """

    def __init__(self, limit: int) -> None:
        self._held: BoundedCache[int, Session] = BoundedCache(limit)
        self._keys = count()
        self.hits = 0
        """Number of prompts of which some tokens were held."""
        self.misses = 0
        """Number of the others."""

    @property
    def limit(self) -> int:
        """The most bytes of all caches."""
        return self._held.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._held.limit = limit

    @property
    def bytes(self) -> int:
        """Bytes of all caches."""
        return self._held.bytes

    def take(self, fresh: Session, ids: Sequence[int], pictures: Sequence[Picture]) -> Session:
        """Return the session to compute a prompt with.

        Args:
            fresh: An empty session, which is returned if no other helps.
            ids: The whole prompt.
            pictures: Its pictures.
        """
        shared = {
            key: session.shared(ids, pictures)
            for key, session in self._held.items()
            if session.keep == fresh.keep
        }
        best = max(shared, key=lambda key: shared[key], default=None)
        if best is None or not shared[best]:
            self.misses += 1
            return fresh
        found = self._held.get(best)
        assert found is not None
        if found.shareable and shared[best] < found.length:  # another prompt may continue it as it is
            found = found.fork()
        elif found.shareable or 2 * shared[best] >= found.length:
            self._held.remove(best)
        else:  # a buffer that is written in place, most of which would be lost
            self.misses += 1
            return fresh
        self.hits += 1
        return found

    def put(self, session: Session) -> None:
        """Keep a session whose conversation has ended, or was ended early."""
        if not session.length or session.nbytes > self._held.limit:
            return
        for key, held in self._held.items():
            if session.continues(held):
                self._held.remove(key)
        self._held.put(next(self._keys), session, session.nbytes)

    def clear(self) -> None:
        """Forget all sessions."""
        self._held.clear()
