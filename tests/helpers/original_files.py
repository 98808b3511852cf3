"""Files of checkpoints in the original format: weights in each way they are stored, and tokenizers."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from published import tokenizer as byte_tokenizer
from safetensors.torch import save_file

__all__ = [
    "BYTES",
    "ROWS",
    "SPECIALS",
    "sentencepiece_model",
    "store",
    "unused_token",
    "write_json",
    "write_tokenizer",
]

BYTES = 256
"""Tokens of a byte-level tokenizer before its special ones."""
ROWS = 340
"""Tokens of the SentencePiece model, and rows of all embedding tables."""
SPECIALS = {
    "llama3": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
    ),
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
"""Special tokens of byte-level tokenizers, by decoder. The others have SentencePiece."""

_SENTENCES = (
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "USER: What is in the picture? ASSISTANT: A dog, two cats and the sea.",
    "[INST] And these? [/INST] They are the same, only smaller.",
)


def store(path: Path, weights: dict[str, Any], storage: str) -> None:
    """Write weights.

    Args:
        path: The directory.
        weights: Tensors by name.
        storage: safetensors or pickle for one file, shards or pickled shards for three and an index.
    """
    pickled, count = "pickle" in storage, 3 if "shards" in storage else 1
    begin, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    files = [f"{begin}-{i + 1:05}-of-{count:05}.{end}" for i in range(count)]
    files = files if count > 1 else [f"{begin}.{end}"]
    places = {name: files[index % count] for index, name in enumerate(sorted(weights))}
    for file in files:
        part = {name: weights[name] for name, place in places.items() if place == file}
        torch.save(part, path / file) if pickled else save_file(part, path / file, {"format": "pt"})
    if count > 1:
        write_json(path / f"{begin}.{end}.index.json", {"metadata": {}, "weight_map": places})
    projector = {name: tensor + 1 for name, tensor in weights.items() if "mm_projector" in name}
    if pickled and projector:  # as published: an older state of the projector, which is not read
        torch.save(projector, path / "mm_projector.bin")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


@functools.cache
def sentencepiece_model() -> bytes:
    """Return a small `tokenizer.model`, trained with the settings of Llama's."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=made,
        model_type="bpe",
        vocab_size=ROWS,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    return made.getvalue()


def write_tokenizer(path: Path, decoder: str) -> None:
    """Write the files of the tokenizer that a decoder has. They list no image token and no template."""
    specials = SPECIALS.get(decoder)
    if specials is None:
        (path / "tokenizer.model").write_bytes(sentencepiece_model())
        said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        said |= {"unk_token": "<unk>", "pad_token": None, "add_bos_token": True, "add_eos_token": False}
        write_json(path / "tokenizer_config.json", said | {"legacy": decoder != "llama"})
        return
    fast = byte_tokenizer({}, {token: BYTES + index for index, token in enumerate(specials)})
    said = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": specials[-1]}
    if decoder == "llama3":
        from tokenizers import processors

        bos = (specials[0], BYTES)
        fast.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", f"{bos[0]} $A $B", [bos])
        said |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": specials[0]}
    fast.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", said)


def unused_token(decoder: str) -> int:
    """Return the id of the byte 0, which no text of the tests contains."""
    from tokenizers import pre_tokenizers

    if decoder in SPECIALS:
        return sorted(pre_tokenizers.ByteLevel.alphabet()).index("\u0100")
    return 3  # after <unk>, <s> and </s>
