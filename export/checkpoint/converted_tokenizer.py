"""Conversion of the tokenizer files that are not a tokenizer.json, and comparison with what they encode."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from visprune.errors import CheckpointError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.transformers_errors import hint_for, reason_of
from visprune.export.files.small_files import check_not_lfs_pointer
from visprune.optional import require

__all__ = [
    "PROBES",
    "convert",
    "convert_sentencepiece",
    "encoder",
    "first_difference",
    "parse",
    "sentencepiece_encoder",
]

# Texts on which two tokenizers are compared.
PROBES = (
    *("In 2023, 1,234.50 of 1000000 cost 7% more.", "a  b   c    d ", " two lines\nand\n\n\ttabs\r\n"),
    *("Größe, naïve, мир", "日本語の漢字、한국어", "don't you'LL x_y(z) != 'q'"),
)
_HINT = "Put the checkpoint's tokenizer.json beside its weights."
_OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")


def parse(text: str, file: Path) -> tokenizers.Tokenizer:
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


def convert(checkpoint: Checkpoint, **options: bool) -> tokenizers.Tokenizer:
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
    if backend is None or backend.get_vocab_size(with_added_tokens=False) < len(PROBES):
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.", _HINT)
    return parse(backend.to_str(), checkpoint.path / "tokenizer.json")


def convert_sentencepiece(
    checkpoint: Checkpoint, settings: Mapping[str, Any], encode: Callable[[str], list[int]]
) -> tuple[tokenizers.Tokenizer, list[str]]:
    """Return the conversion of a SentencePiece model that encodes most like it.

    SentencePiece puts a space in front of every text. The conversions of transformers do so only if the text
    does not begin with one. They also differ after a special token, where `legacy` puts a space in front
    again, and without it none is put. The last resort is SentencePiece's own rule, after special tokens too.

    Args:
        checkpoint: The checkpoint.
        settings: As in `CheckpointTokenizer`. A `legacy` of False is followed if prompts have a form of
            LLaVA's code, because none of those begins with a space.
        encode: Its SentencePiece model.

    Returns:
        The tokenizer, and the texts on which it should encode like its model.
    """
    probes = list(PROBES)
    unspaced = [probe for probe in probes if not probe.startswith(" ")]
    backend = convert(checkpoint)
    if not first_difference(encoder(backend), encode, probes):
        return backend, probes
    modern = settings.get("legacy") is False and checkpoint.conversation is not None
    if modern and not first_difference(encoder(backend), encode, unspaced):
        return backend, unspaced
    backend = convert(checkpoint, legacy=True)
    if not first_difference(encoder(backend), encode, probes):
        return backend, probes
    found = json.loads(backend.to_str())
    rules = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    found |= {"normalizer": {"type": "Sequence", "normalizers": rules}, "pre_tokenizer": None}
    for token in found["added_tokens"]:
        token["normalized"] = False  # else only the token with a "▁" in front would be found in texts
    return parse(json.dumps(found), checkpoint.path / "tokenizer.json"), probes


def sentencepiece_encoder(model: Path) -> Callable[[str], list[int]]:
    """Return the encoder of a SentencePiece model."""
    check_not_lfs_pointer(model)
    sentencepiece = require("sentencepiece", extra="export")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except Exception as error:  # the package passes on whatever its C++ code raises
        raise CheckpointError(f"{model} is not a SentencePiece model: {reason_of(error)}", _HINT) from None
    encode: Callable[[str], list[int]] = processor.encode
    return encode


def encoder(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    """Return the function by which a tokenizer encodes a text, without special tokens around it."""
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def first_difference(
    got: Callable[[str], list[int]], want: Callable[[str], list[int]], probes: Sequence[str]
) -> tuple[str, list[int], list[int]] | None:
    """Return the first text that two encoders encode differently, with both results; None without any."""
    found = ((text, got(text), want(text)) for text in probes)
    return next((row for row in found if row[1] != row[2]), None)
