"""Conversion of text to token ids and back, with image placeholders and a stream of whole characters.

Wraps the `tokenizers` file of a checkpoint. It knows special ids only as arguments, and nothing of the model.
`chat_template` renders a conversation into text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from visprune.errors import BundleError, InputError

__all__ = ["TextStream", "Tokenizer"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are not (yet) a whole character
_MAX_HELD = 8  # tokens; a character has at most 4 bytes, so a longer tail is garbage


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer file with the few ids that text generation needs.

    Attributes:
        backend: The tokenizer of the `tokenizers` package, without truncation and padding.
        image_token: Text of the image placeholder.
        image_token_id: Its id.
        bos_token: Text of the token that begins a sequence, or None.
        eos_token_ids: Tokens that end an answer.
        hidden_ids: Ids of the special tokens, which decoding leaves out.
        byte_ids: Ids of single bytes (`<0x00>` to `<0xFF>`) if the decoder joins them into characters, else
            empty.
    """

    backend: tokenizers.Tokenizer
    image_token: str
    image_token_id: int
    bos_token: str | None
    eos_token_ids: tuple[int, ...]
    hidden_ids: frozenset[int]
    byte_ids: frozenset[int]

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        image_token: str,
        image_token_id: int,
        bos_token: str | None,
        eos_token_ids: tuple[int, ...],
    ) -> Tokenizer:
        """Read a `tokenizer.json`.

        Args:
            path: The file.
            image_token: Text of the image placeholder, as the chat template writes it.
            image_token_id: Its id in the model.
            bos_token: Text of the token that begins a sequence, or None.
            eos_token_ids: Tokens that end an answer.

        Raises:
            BundleError: The file cannot be read, or gives the image placeholder another id.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception, for a missing file too
            raise BundleError(
                f"The tokenizer {path} cannot be read: {error}.", "Export the model again."
            ) from None
        try:
            ids = backend.encode(image_token, add_special_tokens=False).ids
        except TypeError:  # the token is half a character
            ids = []
        if image_token_id not in ids:
            raise BundleError(
                f"The tokenizer {path} does not turn {image_token!r} into the token {image_token_id}.",
                "Give the checkpoint the tokenizer that it was trained with and export again.",
            )
        return cls.from_backend(backend, image_token, image_token_id, bos_token, eos_token_ids)

    @classmethod
    def from_backend(
        cls,
        backend: tokenizers.Tokenizer,
        image_token: str,
        image_token_id: int,
        bos_token: str | None,
        eos_token_ids: tuple[int, ...],
    ) -> Tokenizer:
        """Wrap a tokenizer that is already read; the other arguments are those of `from_file`."""
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        return cls(
            backend=backend,
            image_token=image_token,
            image_token_id=image_token_id,
            bos_token=bos_token,
            eos_token_ids=eos_token_ids,
            hidden_ids=frozenset(i for i, token in added.items() if token.special),
            byte_ids=_byte_ids(backend),
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered prompt.

        The tokenizer's special tokens (usually the one that begins a sequence) are added unless the text
        already begins with the BOS text. This is the rule of `ProcessorMixin.apply_chat_template`.
        """
        begun = self.bos_token is not None and text.startswith(self.bos_token)
        return self.backend.encode(text, add_special_tokens=not begun).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def is_hidden(self, token_id: int) -> bool:
        """Return whether decoding leaves a token out: a special one, or an id that the tokenizer lacks."""
        return token_id in self.hidden_ids or self.backend.id_to_token(token_id) is None

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by their texts."""
        texts = ((self.backend.id_to_token(i), i) for i in sorted(self.hidden_ids))
        return {text: i for text, i in texts if text}

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token with exactly this text, or None."""
        return self.special_tokens.get(text)

    def expand_images(self, ids: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Repeat each image placeholder as often as its image has tokens.

        Args:
            ids: A prompt with one placeholder for each image.
            counts: Number of tokens of each image, in the order of the placeholders.

        Raises:
            InputError: There are more or fewer placeholders than images.
        """
        found = sum(token == self.image_token_id for token in ids)
        if found != len(counts):
            raise InputError(
                f"The prompt has {found} placeholder(s) {self.image_token!r} for {len(counts)} image(s).",
                "Give one image for each placeholder.",
            )
        remaining = iter(counts)
        expanded: list[int] = []
        for token in ids:
            expanded.extend([token] * next(remaining) if token == self.image_token_id else [token])
        return expanded


class TextStream:
    """Turns tokens into text one by one. Text that was returned never changes.

    The texts of all pushes and of `finish` together equal `Tokenizer.decode` of all tokens, up to the first
    stop that is found. Each push decodes only a short window of the last tokens.

    Three kinds of text are held back: an unfinished UTF-8 character; a run of byte tokens (`<0xE4>`...) until
    it ends, because the decoder reads the run as a whole and one wrong byte spoils all of it; and text that
    may be the beginning of a stop.

    Args:
        tokenizer: Tokenizer that decodes.
        stops: Texts that end the answer and are not part of it, none of them empty. The text of a special
            token also ends the answer at that token.
        context: Text before the first token, so that a word which continues it keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), context: str = "") -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._stop_ids = {tokenizer.special_id(stop) for stop in stops} - {None}
        before = tokenizer.backend.encode(context, add_special_tokens=False).ids if context else []
        # The window: tokens whose text was returned, for context, then the others.
        self._ids: list[int] = before[-_MAX_HELD:]
        self._out = len(self._ids)  # number of tokens whose text was returned
        self._out_length = len(tokenizer.decode(self._ids))  # length of their text, decoded alone
        self._held = ""  # text that may begin a stop
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop was found."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Add one token, and return the text that is now final. It is often empty."""
        if token_id in self._stop_ids:
            text = self.finish()
            self._stopped = True
            return text
        # Decoding removes special and unknown tokens before it joins the others. If the window had no other
        # context, the next word would lose its leading space.
        if self._stopped or self._tokenizer.is_hidden(token_id):
            return ""
        self._ids.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(_UNFINISHED):
            return self._release(self._advance(text, len(self._ids)))
        if len(self._ids) - self._out > _MAX_HELD:
            end = self._clean_cut(text)
            return self._release(self._advance(self._tokenizer.decode(self._ids[:end]), end))
        return ""

    def finish(self) -> str:
        """End the stream, and return the text that was held back."""
        if self._stopped:
            return ""
        text = self._release(self._advance(self._tokenizer.decode(self._ids), len(self._ids)))
        text, self._held = text + self._held, ""
        return text

    def _advance(self, text: str, end: int) -> str:
        """Return the new part of `text`, the text of the window up to `end`; these tokens become context."""
        new = text[self._out_length :]
        if new:  # tokens without text are useless as context, so the window stays as it is
            self._ids, self._out = self._ids[self._out :], end - self._out
            self._out_length = len(self._tokenizer.decode(self._ids[: self._out]))
        return new

    def _clean_cut(self, text: str) -> int:
        """Return the last index, at most 4 tokens back, that lies between two characters."""
        for end in range(len(self._ids) - 1, len(self._ids) - 5, -1):
            if self._tokenizer.decode(self._ids[:end]) + self._tokenizer.decode(self._ids[end:]) == text:
                return end
        return self._out

    def _release(self, text: str) -> str:
        """Return the part of new text that is no stop and cannot begin one, and hold the rest back."""
        if not self._stops:
            return text
        text = self._held + text
        # The stop that ends first is used, so that the result does not depend on where tokens end.
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _byte_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Return the ids of byte tokens if the decoder joins bytes into characters, else none."""
    ids = (backend.token_to_id(f"<0x{value:02X}>") for value in range(256))
    found = frozenset(i for i in ids if i is not None)
    letter = backend.token_to_id("<0x41>")
    joins = letter is not None and backend.decode([letter, letter]).replace(" ", "") == "AA"
    return found if joins else frozenset()
