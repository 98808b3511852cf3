"""The answer of a model with its figures: `Generation` at once, `Stream` piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from visprune.errors import UsageError

__all__ = ["FinishReason", "Generation", "GenerationLimits", "Stream", "as_stops"]

FinishReason = Literal["eos", "stop", "length"]
"""How an answer ended: by the model's own token, by a stop, or at a limit (max_new_tokens or the context)."""


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Limits at which an answer ends, if the model does not end it before.

    Attributes:
        max_new_tokens: The most tokens to generate.
        stop: Texts that end the answer and are not part of it. The text of a special token ends it at that
            token.

    Raises:
        UsageError: max_new_tokens is not a whole number of at least 1, or a stop is empty or not a text.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise UsageError(
                f"max_new_tokens is {self.max_new_tokens!r}, which is not a whole number.",
                "Give a whole number of at least 1.",
            )
        if not all(isinstance(stop, str) for stop in self.stop):
            raise UsageError(f"The stops {self.stop!r} are not all texts.", "Give only texts (str).")
        if self.max_new_tokens < 1:
            raise UsageError(
                f"Cannot generate {self.max_new_tokens} tokens.", "Give max_new_tokens of at least 1."
            )
        if "" in self.stop:
            raise UsageError("A stop string is empty.", "Leave it out.")


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer and its figures.

    Attributes:
        text: The answer, without special tokens and without the stop text.
        token_ids: The generated tokens, including the one that ended the answer.
        tokens_in: Length of the whole prompt in tokens, including visual tokens and cached ones.
        tokens_kept: Visual tokens kept, of all images encoded in this call. If tokens are pruned inside the
            LLM, those that reach the last layer.
        visual_tokens: Visual tokens of the same images before pruning.
        keep_indices: For each of these images the indices in [0, N) of the kept visual tokens, in the order
            in which a method chose them, which is ascending unless it merges tokens; -1 is a CLS token. In an
            image of several tiles, a token's index is tile * N + its index in the tile. Where a method makes
            the image itself smaller, N and the indices are those of the smaller image, all of which is kept.
        merged_indices: For each of these images the patches that a method merged into kept tokens which stand
            for other patches, ascending.
        layer_tokens: Number of visual tokens of this call that entered each layer of the LLM; empty if none
            are pruned inside it.
        finish_reason: Why the answer ended.
        tokens_cached: Number of tokens of the prompt that were in the cache of an earlier answer.
        images_cached: Number of these images that were not encoded, because their features or their visual
            tokens were cached.
        timings_ms: Milliseconds of `preprocess` (images and text), of each graph of the prefill by its name
            (the decoder is `prefill`), of `decode` (all later tokens), `decode_per_token`, and `total`; also
            of `opening`, the wait for graphs, if some were still being opened.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens_in: int
    tokens_kept: int
    visual_tokens: int
    keep_indices: tuple[tuple[int, ...], ...]
    merged_indices: tuple[tuple[int, ...], ...]
    layer_tokens: tuple[int, ...]
    finish_reason: FinishReason
    tokens_cached: int
    images_cached: int
    timings_ms: dict[str, float]


def as_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return one text, or several, as the tuple of `GenerationLimits`, which refuses anything else."""
    if isinstance(stop, (str, bytes)) or not isinstance(stop, Iterable):
        return (stop,)
    return tuple(stop)


class Stream(Iterator[str]):
    """The text of an answer, piece by piece. Tokens are generated while this is iterated.

    The joined pieces are `result.text`. If the stream is closed early, the generation ends, and the answer
    does not become part of the conversation.

    Args:
        pieces: Generator that yields the text which each token makes final, often "". With the last token it
            returns the generation, whose text ends with what that token made final.
    """

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        self._pieces = pieces
        self._given = 0  # characters of the text
        self._result: Generation | None = None

    def __next__(self) -> str:
        while (piece := self.step()) == "":
            pass
        if piece is None:
            raise StopIteration
        return piece

    def step(self) -> str | None:
        """Compute one token; at first also the whole prompt.

        Returns:
            The text that is final now, often ""; None if there was no token to compute any more.
        """
        try:
            piece = next(self._pieces)
        except StopIteration as end:
            if end.value is None:
                return None
            self._result = end.value
            piece = self._result.text[self._given :]
        self._given += len(piece)
        return piece

    @property
    def ended(self) -> bool:
        """Whether the last token was computed, and `result` is there."""
        return self._result is not None

    @property
    def result(self) -> Generation:
        """The whole answer. The rest of it is generated now.

        Raises:
            UsageError: The stream was closed before its end.
        """
        for _ in self:
            pass
        if self._result is None:
            raise UsageError("This stream was closed before its end.", "Generate again.")
        return self._result

    def close(self) -> None:
        """End the generation."""
        self._pieces.close()
