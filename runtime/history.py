"""Record of the tokens in a conversation's cache, and of how many a new prompt can keep.

If tokens are pruned inside the LLM, layers hold different tokens. The tokens of an image are then chosen
once, by the whole prompt that was fed with it. If a new prompt shares only a part of that one, all of it is
fed again, so that the same tokens are chosen as in a new conversation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["History", "Image"]


@dataclass(frozen=True, slots=True)
class Image:
    """The placeholders of one image.

    Attributes:
        start: Index of the first placeholder in the prompt.
        length: Number of placeholders.
        key: Digest of the image (`Picture.key`).
    """

    start: int
    length: int
    key: bytes

    @property
    def end(self) -> int:
        """Index after the last placeholder."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Indices of tokens that were fed in one prefill. Decoded tokens belong to no prompt."""

    start: int
    end: int


class History:
    """The tokens of a cache.

    Args:
        points: Number of prune points inside the LLM.
    """

    def __init__(self, points: int) -> None:
        self.ids: list[int] = []
        """Ids of all tokens that entered the LLM."""
        self.held: list[list[int]] = [[] for _ in range(points + 1)]
        """For the layers up to each prune point, and those after the last one: indices of `ids` they hold."""
        self._images: list[Image] = []
        self._prompts: list[_Prompt] = []

    def rewind(self, ids: Sequence[int], images: Sequence[Image]) -> int:
        """Forget the tokens that a new prompt cannot keep, and record the prompt.

        Args:
            ids: The whole prompt.
            images: Images of the prompt, in order.

        Returns:
            How many of the first `ids` are held: fewer than all, and no image is cut in two.
        """
        kept, begun = self._reusable(ids, images)
        self.crop(kept)
        # Images and prompts past the held tokens are never read, so an interrupted run does no harm.
        self._images += [image for image in images if image.start >= kept]
        self._prompts.append(_Prompt(begun, len(ids)))
        return kept

    def shared(self, ids: Sequence[int], images: Sequence[Image]) -> int:
        """Return how many tokens `rewind` would keep for a prompt, and change nothing."""
        return self._reusable(ids, images)[0]

    def copy(self) -> History:
        """Return a history that begins with the same tokens."""
        other = History(len(self.held) - 1)
        other.ids = list(self.ids)
        other.held = [list(held) for held in self.held]
        other._images, other._prompts = list(self._images), list(self._prompts)
        return other

    def continues(self, other: History) -> bool:
        """Return whether this history begins with all tokens of another one."""
        images, same = len(other._images), len(other.ids)
        return self.ids[:same] == other.ids and self._images[:images] == other._images

    def crop(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.held = [held[: bisect_left(held, length)] for held in self.held]
        self.ids = self.ids[:length]
        self._images = [image for image in self._images if image.end <= length]
        self._prompts = [prompt for prompt in self._prompts if prompt.end <= length]

    def extend(self, ids: Sequence[int], survivors: Sequence[Sequence[int]]) -> None:
        """Add tokens that were fed.

        Args:
            ids: The new tokens.
            survivors: For each prune point, indices of the tokens that it keeps, among those that reach it.
                Empty if all are kept.
        """
        new = list(range(len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        for group in range(len(self.held)):
            if group and survivors:
                new = [new[index] for index in survivors[group - 1]]
            self.held[group] += new

    def _reusable(self, ids: Sequence[int], images: Sequence[Image]) -> tuple[int, int]:
        """Return how many of the first `ids` can be kept, and where the prompt begins that is fed then."""
        kept = self._common_prefix(ids, images)
        begun = self._prompt_start(kept)
        if len(self.held) > 1 and any(image.start >= begun for image in images):
            kept = begun
        return kept, begun

    def _common_prefix(self, ids: Sequence[int], images: Sequence[Image]) -> int:
        """Return how many of the first `ids` are cached, with no image cut in two."""
        count = 0
        # The last token is always fed, because its logits are needed.
        for cached, wanted in zip(self.ids, ids[:-1], strict=False):
            if cached != wanted:
                break
            count += 1
        for index, image in enumerate(images):
            if image.start >= count:
                break
            same = index < len(self._images) and self._images[index] == image
            if not same or image.end > count:
                return image.start
        return count

    def _prompt_start(self, length: int) -> int:
        """Return the start of the prompt that a crop at `length` would cut in two; `length` if none."""
        return next((prompt.start for prompt in self._prompts if prompt.start < length < prompt.end), length)
