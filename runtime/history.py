"""Which tokens the cache of a conversation holds, and how many of them a new prompt can keep.

Where tokens are pruned inside the LLM, layers hold different tokens. An image's tokens are then chosen
once, by all that is fed with it; where a part of that is taken back, all of it is fed again, so that what is
chosen is what would be, had that prompt never been there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["History", "Image"]


@dataclass(frozen=True, slots=True)
class Image:
    """The placeholders of one image: where they begin, how many they are, and which image it is."""

    start: int
    length: int
    key: bytes

    @property
    def end(self) -> int:
        """The place after them."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Tokens that were fed at once, as indices of the sequence; decoded ones are in no prompt."""

    start: int
    end: int


class History:
    """The tokens of a cache.

    Args:
        points: Prune points inside the LLM.
    """

    def __init__(self, points: int) -> None:
        self.ids: list[int] = []
        """Every token that entered the LLM."""
        self.held: list[list[int]] = [[] for _ in range(points + 1)]
        """For the layers up to each prune point, and those after the last: which of `ids` they hold."""
        self._images: list[Image] = []
        self._prompts: list[_Prompt] = []

    def rewind(self, ids: Sequence[int], images: Sequence[Image]) -> int:
        """Forget what a new prompt cannot keep, and expect the rest of it.

        Args:
            ids: The whole prompt.
            images: Of the prompt, in order.

        Returns:
            How many of `ids` are held: fewer than all, with no image cut in two.
        """
        kept = self._common_prefix(ids, images)
        begun = self._prompt_start(kept)
        if len(self.held) > 1 and any(image.start >= begun for image in images):
            kept = begun
        self.crop(kept)
        # Neither is looked at past the end of what is held, so an interrupted run does no harm.
        self._images += [image for image in images if image.start >= kept]
        self._prompts.append(_Prompt(begun, len(ids)))
        return kept

    def crop(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.held = [held[: bisect_left(held, length)] for held in self.held]
        self.ids = self.ids[:length]
        self._images = [image for image in self._images if image.end <= length]
        self._prompts = [prompt for prompt in self._prompts if prompt.end <= length]

    def extend(self, ids: Sequence[int], survivors: Sequence[Sequence[int]]) -> None:
        """Add tokens.

        Args:
            ids: The new ones.
            survivors: For each prune point which of those that came to it are left; all if it is empty.
        """
        new = list(range(len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        for group in range(len(self.held)):
            if group and survivors:
                new = [new[index] for index in survivors[group - 1]]
            self.held[group] += new

    def _common_prefix(self, ids: Sequence[int], images: Sequence[Image]) -> int:
        count = 0
        # The last token is always fed, because its logits are wanted.
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
        """Where the prompt began that a cut at `length` would part; else `length`."""
        return next((prompt.start for prompt in self._prompts if prompt.start < length < prompt.end), length)
