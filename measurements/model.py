"""Checkpoints with random weights; most measurements use CLIP ViT-L/14-336 with Qwen2-0.5B's shapes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from visprune.bundled import MODEL_DIR

__all__ = ["THREADS", "clip_large", "make", "tokenizer", "write", "write_processor"]

THREADS = len(os.sched_getaffinity(0))
"""Hardware threads that this process may use."""


def make(path: Path, dtype: str = "float32") -> Path:
    """Write the checkpoint of most measurements (3.2 GB in float32) unless it exists, and return its path."""
    text = transformers.Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    )
    return write(path, clip_large(), text, dtype, tied=True)


def write(path: Path, vision: Any, text: Any, dtype: str = "float32", *, tied: bool = False) -> Path:
    """Write a LLaVA checkpoint with random weights (seed 0) unless it exists, and return its path.

    Args:
        path: The directory.
        vision: Configuration of the vision tower.
        text: Configuration of the decoder.
        dtype: Name of PyTorch's dtype of the weights.
        tied: Whether the output head shares the token table.
    """
    if (path / "config.json").is_file():
        return path
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer().convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    write_processor(path)
    return path


def clip_large() -> transformers.CLIPVisionConfig:
    """Return the configuration of CLIP ViT-L/14-336."""
    return transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Return the demo model's tokenizer; larger ids of a model have no text."""
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


def write_processor(path: Path) -> None:
    """Write the tokenizer, and the image processor for CLIP ViT-L/14-336."""
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(path)
