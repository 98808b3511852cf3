"""The tokenizer of a checkpoint.

A `tokenizer.json` is what the model was trained with, so it is taken as it is: transformers' classes would
rebuild the tokenizer from its vocabulary and may split digits and spaces differently. If a checkpoint has a
file of another kind, transformers converts it. In both cases a few texts are encoded with the checkpoint's
tokenizer and with the one to be written, and must give the same ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from visprune.errors import CheckpointError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.transformers_errors import hint_for, reason_of
from visprune.export.files.small_files import (
    check_not_lfs_pointer,
    file_exists,
    read_text,
)
from visprune.optional import require

__all__ = ["CheckpointTokenizer", "read_tokenizer", "role_token"]

_PROBES = (
    *("In 2023, 1,234.50 of 1000000 cost 7% more.", "a  b   c    d ", " two lines\nand\n\n\ttabs\r\n"),
    *("Größe, naïve, мир", "日本語の漢字、한국어", "don't you'LL x_y(z) != 'q'"),
)
_HINT = "Put the checkpoint's tokenizer.json beside its weights."
_OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")


@dataclass(frozen=True, slots=True)
class CheckpointTokenizer:
    """The tokenizer of a checkpoint, with the settings from the files beside it.

    Attributes:
        backend: The tokenizer, without truncation and padding.
        json: Text of its `tokenizer.json`.
        bos_token: Text of the token that begins a sequence, or None.
        eos_token: Text of the token that ends a sequence, or None.
        settings: Content of special_tokens_map.json, overridden by that of tokenizer_config.json.
        notes: Sentences that a user should read before using the bundle.
    """

    backend: tokenizers.Tokenizer
    json: str
    bos_token: str | None
    eos_token: str | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_tokenizer(checkpoint: Checkpoint) -> CheckpointTokenizer:
    """Read the tokenizer of a checkpoint.

    Raises:
        CheckpointError: There is no tokenizer, it cannot be read, or its conversion changes how texts are
            encoded.
        MissingExtraError: The package that reads its file is not installed.
    """
    path = checkpoint.path
    settings = checkpoint.read_json("tokenizer_config.json")
    settings = checkpoint.read_json("special_tokens_map.json") | settings
    file, model = path / "tokenizer.json", path / "tokenizer.model"
    probes = list(_PROBES)
    if file_exists(file):
        text, name = read_text(file), file.name
        backend, encode = _parse(text, file), _encoder(_parse(text, file))
        probes += [f"a {token.content}b" for token in backend.get_added_tokens_decoder().values()]
    else:
        text, name = "", model.name
        if file_exists(model):
            encode = _sentencepiece(model)
            backend = _convert(checkpoint)
            # With `legacy` leading spaces are treated by an older rule.
            if _first_difference(_encoder(backend), encode, probes):
                backend = _convert(checkpoint, legacy=True)
        else:
            backend = _convert(checkpoint)
            encode = _encoder(_parse(backend.to_str(), file))
    added = _add_tokens(backend, settings, checkpoint.read_json("added_tokens.json"))
    added |= _add_placeholders(backend, checkpoint.placeholders)
    if not text or added:
        text = backend.to_str(pretty=True)
    # The text is parsed once more, because that is what the runtime will do.
    if different := _first_difference(_encoder(_parse(text, file)), encode, probes):
        raise CheckpointError(
            f"The tokenizer that would be written makes {different[1]} of {different[0]!r}, and the "
            f"checkpoint's {name} makes {different[2]}.",
            "Give the checkpoint the tokenizer.json that it was trained with.",
        )
    bos, eos = (_special_token(checkpoint, settings, key) for key in ("bos_token", "eos_token"))
    return CheckpointTokenizer(backend, text, bos, eos, settings, _notes(backend, settings, bos))


def _parse(text: str, file: Path) -> tokenizers.Tokenizer:
    """Make a tokenizer, without truncation and padding, from the text of a `tokenizer.json`."""
    try:
        found = tokenizers.Tokenizer.from_str(text)
        found.no_truncation()
        found.no_padding()
        found.encode("a")
        return found
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in its Rust code is not an Exception
        raise CheckpointError(
            f"{file} cannot be read: {reason_of(error)}",
            "Update the package tokenizers, or take the file from the checkpoint's source.",
        ) from None


def _convert(checkpoint: Checkpoint, **options: bool) -> tokenizers.Tokenizer:
    """Have transformers convert files other than tokenizer.json."""
    if not any((checkpoint.path / name).is_file() for name in _OTHER_FILES):
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.json.", _HINT)
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            checkpoint.path,
            local_files_only=True,
            trust_remote_code=checkpoint.trust_remote_code,
            **options,
        )
    except Exception as error:  # each kind of file fails with errors of other types
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer.json, and its other files cannot be converted: "
            f"{reason_of(error)}",
            hint_for(error, _HINT),
        ) from None
    backend: tokenizers.Tokenizer | None = getattr(found, "backend_tokenizer", None)
    if backend is None or backend.get_vocab_size(with_added_tokens=False) < len(_PROBES):
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.", _HINT)
    return _parse(backend.to_str(), checkpoint.path / "tokenizer.json")


def _sentencepiece(model: Path) -> Callable[[str], list[int]]:
    """Return the encoder of a SentencePiece model."""
    check_not_lfs_pointer(model)
    sentencepiece = require("sentencepiece", extra="export")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except Exception as error:  # the package passes on whatever its C++ code raises
        raise CheckpointError(f"{model} is not a SentencePiece model: {reason_of(error)}", _HINT) from None
    encode: Callable[[str], list[int]] = processor.encode
    return encode


def _encoder(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _add_tokens(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], listed: Mapping[str, Any]
) -> bool:
    """Add the tokens that only the files beside the tokenizer list; return whether there were any.

    Args:
        backend: The tokenizer, which is changed.
        settings: As in `CheckpointTokenizer`.
        listed: Content of added_tokens.json, ids by text.

    Raises:
        CheckpointError: The tokenizer would give a token another id than the files do.
    """
    wanted: dict[int, tokenizers.AddedToken] = {}
    for content, index in listed.items():
        if isinstance(index, int):
            wanted[index] = tokenizers.AddedToken(content, special=True, normalized=False)
    decoder = settings.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            flags = {
                name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "normalized", "single_word")
            }
            special = bool(entry.get("special"))
            wanted[int(key)] = tokenizers.AddedToken(entry["content"], special=special, **flags)
    added = False
    for index, token in sorted(wanted.items()):
        if backend.token_to_id(token.content) is not None:
            continue
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if (got := backend.token_to_id(token.content)) != index:
            raise CheckpointError(
                f"The files beside the tokenizer give {token.content!r} the id {index}, and the tokenizer's "
                f"next free id is {got}.",
                "Take tokenizer.json and tokenizer_config.json of one checkpoint.",
            )
        added = True
    return added


def _add_placeholders(backend: tokenizers.Tokenizer, placeholders: Mapping[str, int]) -> bool:
    """Add placeholders that the tokenizer lacks, under ids of our choice; return whether there were any.

    A tokenizer gives a new token its next free id. Ids between that and the chosen one, which are rows of the
    embedding table that no text uses, are filled with tokens that no text contains.
    """
    added = False
    for text, index in sorted(placeholders.items(), key=lambda item: item[1]):
        if backend.token_to_id(text) is None:
            unused = [f"<|unused_{free}|>" for free in range(backend.get_vocab_size(), index)]
            backend.add_special_tokens([*unused, tokenizers.AddedToken(text, special=True, normalized=False)])
            added = True
    return added


def _first_difference(
    got: Callable[[str], list[int]], want: Callable[[str], list[int]], probes: Sequence[str]
) -> tuple[str, list[int], list[int]] | None:
    """Return the first text that two encoders encode differently, with both results; None without any."""
    found = ((text, got(text), want(text)) for text in probes)
    return next((row for row in found if row[1] != row[2]), None)


def role_token(settings: Mapping[str, Any], role: str) -> str | None:
    """Return the text of the token of a role such as `bos_token`, or None.

    The settings hold its text, or an object with the text as its `content`.
    """
    value = settings.get(role)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _special_token(checkpoint: Checkpoint, settings: Mapping[str, Any], key: str) -> str | None:
    """Return a special token by its role, from the files or else from transformers' tokenizer class."""
    if key in settings:
        return role_token(settings, key)
    with contextlib.suppress(Exception):  # a class that cannot be loaded names no token
        found = transformers.AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
        token = getattr(found, key, None)
        return token if isinstance(token, str) else None
    return None


def _notes(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], bos: str | None) -> tuple[str, ...]:
    """Return a note if the settings and the tokenizer disagree on whether a text begins with `bos`."""
    wanted = settings.get("add_bos_token")
    if not isinstance(wanted, bool) or bos is None:
        return ()
    begins = backend.encode("a").ids[:1] == [backend.token_to_id(bos)]
    if begins == wanted:
        return ()
    does = "puts" if begins else "does not put"
    return (
        f"tokenizer_config.json has add_bos_token {str(wanted).lower()}, and tokenizer.json {does} {bos} in "
        "front; tokenizer.json is followed.",
    )
