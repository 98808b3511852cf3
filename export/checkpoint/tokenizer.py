"""The tokenizer of a checkpoint, as its `tokenizer.json` has it.

That file is what the model was trained with, so it is taken as it is: classes of transformers rebuild a
tokenizer from the vocabulary, with their own idea of digits and spaces. Where a checkpoint has another kind
of file, transformers converts it. Either way a few texts are encoded both ways before anything is written.
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
from visprune.export.checkpoint.small_files import check_pointer, is_there, read_object, read_text
from visprune.export.checkpoint.transformers_errors import first_line, hint
from visprune.optional import require

__all__ = ["CheckpointTokenizer", "read_tokenizer", "token_of"]

_PROBES = (
    *("In 2023, 1,234.50 of 1000000 cost 7% more.", "a  b   c    d ", " two lines\nand\n\n\ttabs\r\n"),
    *("Größe, naïve, мир", "日本語の漢字、한국어", "don't you'LL x_y(z) != 'q'"),
)
_HINT = "Put the checkpoint's tokenizer.json beside its weights."
_OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")


@dataclass(frozen=True, slots=True)
class CheckpointTokenizer:
    """A tokenizer.

    Attributes:
        backend: Without truncation and padding.
        json: The text of its `tokenizer.json`.
        bos_token: Text of the token that begins a sequence, or None.
        eos_token: Text of the token that ends one, or None.
        said: What the files beside it say of it.
        notes: What a user should know of it.
    """

    backend: tokenizers.Tokenizer
    json: str
    bos_token: str | None
    eos_token: str | None
    said: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_tokenizer(checkpoint: Checkpoint) -> CheckpointTokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        CheckpointError: There is none, it cannot be read, or its conversion changes what texts become.
        MissingExtraError: A package that reads its file is not installed.
    """
    path = checkpoint.path
    said = read_object(path / "tokenizer_config.json")
    said = read_object(path / "special_tokens_map.json") | said
    file, model = path / "tokenizer.json", path / "tokenizer.model"
    probes = list(_PROBES)
    if is_there(file):
        text, name = read_text(file), file.name
        backend, encode = _parse(text, file), _encoder(_parse(text, file))
        probes += [f"a {token.content}b" for token in backend.get_added_tokens_decoder().values()]
    else:
        text, name = "", model.name
        if is_there(model):
            encode = _sentencepiece(model)
            backend = _converted(checkpoint)
            if _differs(_encoder(backend), encode, probes):  # an older rule for the spaces in front
                backend = _converted(checkpoint, legacy=True)
        else:
            backend = _converted(checkpoint)
            encode = _encoder(_parse(backend.to_str(), file))
    added = _add_tokens(backend, said, read_object(path / "added_tokens.json"))
    if not text or added:
        text = backend.to_str(pretty=True)
    # What is compared is what the runtime will read.
    if different := _differs(_encoder(_parse(text, file)), encode, probes):
        raise CheckpointError(
            f"The tokenizer that would be written makes {different[1]} of {different[0]!r}, and the "
            f"checkpoint's {name} makes {different[2]}.",
            "Give the checkpoint the tokenizer.json that it was trained with.",
        )
    bos, eos = (_special(checkpoint, said, key) for key in ("bos_token", "eos_token"))
    return CheckpointTokenizer(backend, text, bos, eos, said, _notes(backend, said, bos))


def _parse(text: str, file: Path) -> tokenizers.Tokenizer:
    try:
        found = tokenizers.Tokenizer.from_str(text)
        found.no_truncation()
        found.no_padding()
        found.encode("a")
        return found
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception, and a panic of its Rust, which is none
        raise CheckpointError(
            f"{file} cannot be read: {first_line(error)}",
            "Update the package tokenizers, or take the file from the checkpoint's source.",
        ) from None


def _converted(checkpoint: Checkpoint, **options: bool) -> tokenizers.Tokenizer:
    """What transformers makes of other files than tokenizer.json."""
    if not any((checkpoint.path / name).is_file() for name in _OTHER_FILES):
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.json.", _HINT)
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            checkpoint.path,
            local_files_only=True,
            trust_remote_code=checkpoint.trust_remote_code,
            **options,
        )
    except Exception as error:  # it fails in as many ways as there are files
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer.json, and what it has cannot be converted: "
            f"{first_line(error)}",
            hint(error, _HINT),
        ) from None
    backend: tokenizers.Tokenizer | None = getattr(found, "backend_tokenizer", None)
    if backend is None or backend.get_vocab_size(with_added_tokens=False) < len(_PROBES):
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.", _HINT)
    return _parse(backend.to_str(), checkpoint.path / "tokenizer.json")


def _sentencepiece(model: Path) -> Callable[[str], list[int]]:
    check_pointer(model)
    sentencepiece = require("sentencepiece", extra="export")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except Exception as error:  # the package raises what its C++ does
        raise CheckpointError(f"{model} is no model of SentencePiece: {first_line(error)}", _HINT) from None
    encode: Callable[[str], list[int]] = processor.encode
    return encode


def _encoder(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _add_tokens(backend: tokenizers.Tokenizer, said: Mapping[str, Any], listed: Mapping[str, Any]) -> bool:
    """Add tokens that only the files beside the tokenizer know, under their ids; tell whether any were."""
    wanted: dict[int, tokenizers.AddedToken] = {}
    for content, index in listed.items():
        if isinstance(index, int):
            wanted[index] = tokenizers.AddedToken(content, special=True, normalized=False)
    decoder = said.get("added_tokens_decoder")
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


def _differs(
    got: Callable[[str], list[int]], want: Callable[[str], list[int]], probes: Sequence[str]
) -> tuple[str, list[int], list[int]] | None:
    """The first text of which one makes other ids than the other, with both."""
    found = ((text, got(text), want(text)) for text in probes)
    return next((row for row in found if row[1] != row[2]), None)


def token_of(said: Mapping[str, Any], role: str) -> str | None:
    """The token of a role, such as `bos_token`: the files have its text, or an object with a `content`."""
    value = said.get(role)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _special(checkpoint: Checkpoint, said: Mapping[str, Any], key: str) -> str | None:
    """A special token by its role: as the files name it, or else as the tokenizer's class does."""
    if key in said:
        return token_of(said, key)
    with contextlib.suppress(Exception):  # a class that cannot be had names nothing
        found = transformers.AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
        token = getattr(found, key, None)
        return token if isinstance(token, str) else None
    return None


def _notes(backend: tokenizers.Tokenizer, said: Mapping[str, Any], bos: str | None) -> tuple[str, ...]:
    asked = said.get("add_bos_token")
    if not isinstance(asked, bool) or bos is None:
        return ()
    begins = backend.encode("a").ids[:1] == [backend.token_to_id(bos)]
    if begins == asked:
        return ()
    does = "puts" if begins else "does not put"
    return (
        f"tokenizer_config.json has add_bos_token {str(asked).lower()}, and tokenizer.json {does} {bos} in "
        "front; tokenizer.json is followed.",
    )
