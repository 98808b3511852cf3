"""What a generation gives: the answer with its figures, at once or piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from visprune.errors import UsageError

__all__ = ["FinishReason", "Generation", "GenerationLimits", "Stream", "as_stops"]

FinishReason = Literal["eos", "stop", "length"]
"""The model ended the answer; a stop was completed; `max_new_tokens` or the context was reached."""


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """When an answer ends, besides by the model's own token.

    Attributes:
        max_new_tokens: Most tokens generated.
        stop: Texts that end the answer and are not part of it; that of a special token stands for this token.

    Raises:
        UsageError: No token may be generated, or a stop string is empty.
    """

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise UsageError(
                f"max_new_tokens is {self.max_new_tokens!r}, which is no whole number.",
                "Give one of at least 1.",
            )
        if not all(isinstance(stop, str) for stop in self.stop):
            raise UsageError(f"The stops {self.stop!r} are not all texts.", "Give texts.")
        if self.max_new_tokens < 1:
            raise UsageError(
                f"Cannot generate {self.max_new_tokens} tokens.", "Give max_new_tokens of at least 1."
            )
        if "" in self.stop:
            raise UsageError("A stop string is empty.", "Leave it out.")


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer.

    Attributes:
        text: Without special tokens and without the stop string.
        token_ids: The generated tokens, the one that ends the answer included.
        tokens_in: Length of the whole prompt, visual tokens included, cached or not.
        tokens_kept: Visual tokens kept, over the images encoded in this call; to the last layer where they
            are pruned inside the LLM.
        visual_tokens: Visual tokens there were before pruning, over the same images.
        keep_indices: For each of these images the kept visual tokens, ascending: their indices in [0, N), and
            tile * N more where an image is several tiles.
        layer_tokens: Visual tokens of this call that entered each layer of the LLM; empty where none is
            pruned inside it.
        finish_reason: Why the answer ended.
        timings_ms: Milliseconds: `preprocess` (pictures and text), each graph of the prefill by its name
            (the decoder's as `prefill`), `decode` for all later tokens, `decode_per_token`, `total`.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens_in: int
    tokens_kept: int
    visual_tokens: int
    keep_indices: tuple[tuple[int, ...], ...]
    layer_tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings_ms: dict[str, float]


def as_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One text, or several, as `GenerationLimits` takes them; anything else is left for it to refuse."""
    if isinstance(stop, (str, bytes)) or not isinstance(stop, Iterable):
        return (stop,)
    return tuple(stop)


class Stream(Iterator[str]):
    """The text of an answer as it comes. Generating happens while this is iterated.

    The pieces joined are `result.text`. Leaving early ends the generation; such an answer does not
    become part of a conversation.

    Args:
        pieces: Yields text and returns the generation.
    """

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        self._pieces = pieces
        self._result: Generation | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self._result = end.value
            raise StopIteration from None

    @property
    def result(self) -> Generation:
        """The whole answer; what is not generated yet is generated now.

        Raises:
            UsageError: The stream was closed before its end.
        """
        for _ in self:
            pass
        if self._result is None:
            raise UsageError("This stream was closed before its end.", "Generate again.")
        return self._result

    def close(self) -> None:
        """Generate no more."""
        self._pieces.close()
