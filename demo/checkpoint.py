"""The checkpoint of the demo model: its configuration, tokenizer and chat template, and how it is written.

Everything has the Hugging Face form of a LLaVA-1.5, so that nothing in visprune treats the demo model in a
special way. This module knows nothing about training.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from visprune.demo.scenes import SIZE

__all__ = ["PATCH", "build_config", "build_tokenizer", "write_checkpoint"]

PATCH = 8
"""Side of a patch in pixels; an image has 12 x 12 patches."""

_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_MEAN = [0.5, 0.5, 0.5]
_STD = [0.25, 0.25, 0.25]

# The turns of LLaVA-1.5, but with the end token of each answer written out: then a follow-up turn continues
# exactly the tokens that were generated, and their cache stays valid.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set images = 0 -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') -%}
{%- set text = texts | map(attribute='text') | join(' ') -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{{- text + ' ' -}}
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' + '<image>\\n' * images + text + ' ' -}}
{%- else -%}
{{- 'ASSISTANT: ' -}}{%- generation -%}{{- text + '</s>' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""

_CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
---

# The visprune demo model

A small LLaVA ({parameters:.1f} M parameters, {size} x {size} pixels, {tokens} visual tokens) trained from
scratch on generated scenes by `demo/train.py` of visprune. It answers what the digit, the letter, the shape
and the arrow in such a scene are, which colour they have and where they stand. It knows nothing else, and
its answers about any other picture mean nothing.

It exists so that visual-token pruning can be judged without a network. Exact match on held-out questions,
pruned and unpruned, is in `docs/demo.md`; the log of the training run is in `demo/train.log`.
"""


def build_tokenizer(lines: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from chat lines: it encodes any text, and common words are one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in _SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", _SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_config(vocab_size: int) -> LlavaConfig:
    """Return the configuration of the demo model for a vocabulary of this size."""
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        # The default of 0.02 suits widths in the thousands; a narrow model learns faster from a wider start.
        initializer_range=0.05,
        bos_token_id=_SPECIAL.index("<s>"),
        eos_token_id=_SPECIAL.index("</s>"),
        pad_token_id=_SPECIAL.index("<pad>"),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
    )


def write_checkpoint(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Write a complete checkpoint directory: into a staging directory first, which is renamed when complete.

    Args:
        model: The trained model, in any dtype; the weights are written as fp16.
        tokenizer: From `build_tokenizer`.
        out: The directory to make or to replace.
    """
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=_MEAN,
            image_std=_STD,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token: the processor counts it, and "default" drops it
        chat_template=_CHAT_TEMPLATE,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.half()
    half.generation_config = GenerationConfig(
        bos_token_id=_SPECIAL.index("<s>"),
        eos_token_id=_SPECIAL.index("</s>"),
        pad_token_id=_SPECIAL.index("<pad>"),
        do_sample=False,
        max_new_tokens=16,
    )
    half.save_pretrained(stage)
    processor.save_pretrained(stage)
    processor.image_processor.save_pretrained(stage)  # preprocessor_config.json, for older readers
    count = sum(p.numel() for p in model.parameters()) / 1e6
    card = _CARD.format(parameters=count, size=SIZE, tokens=(SIZE // PATCH) ** 2)
    (stage / "README.md").write_text(card, encoding="utf-8")
    stage.chmod(0o755)  # mkdtemp and safetensors make files that only their owner can read
    for file in stage.iterdir():
        file.chmod(0o644)
    old = out.with_name(f".{out.name}-old")
    if out.exists():
        out.rename(old)
    stage.rename(out)
    shutil.rmtree(old, ignore_errors=True)
