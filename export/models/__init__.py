"""The list of model families that visprune exports, with one file for each `model_type` of Hugging Face.

`MODELS` are whole checkpoints; `TOWERS` are the vision encoders in them. A decoder needs no file, because any
decoder that uses the attention interface of transformers is traced as it is. Those in `DECODERS` can also be
cut into segments, because their layers have Llama's form and nothing happens between layers.
"""

from __future__ import annotations

import importlib
from typing import Any

from visprune.errors import UnsupportedError

__all__ = ["DECODERS", "MODELS", "TOWERS", "check_cut", "family", "tower"]

MODELS = ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava")
TOWERS = ("clip_vision_model", "siglip_vision_model", "llava_hr_vision_model")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def family(model_type: str) -> Any:
    """Return the module of a checkpoint family.

    Raises:
        UnsupportedError: The family is not supported.
    """
    if model_type in DECODERS:
        raise UnsupportedError(
            f"The model type {model_type!r} is not supported: it is a language model alone.",
            f"Supported model types: {', '.join(MODELS)}. If LLaVA's training made a LoRA of this model, "
            "give it with --adapter.",
        )
    return _module(model_type, MODELS, "model type", "model types")


def tower(model_type: str) -> Any:
    """Return the module of a vision tower.

    Raises:
        UnsupportedError: The tower is not supported.
    """
    return _module(model_type, TOWERS, "vision tower", "towers")


def _module(model_type: str, supported: tuple[str, ...], kind: str, kinds: str) -> Any:
    if model_type not in supported:
        raise UnsupportedError(
            f"The {kind} {model_type!r} is not supported.", f"Supported {kinds}: {', '.join(supported)}."
        )
    return importlib.import_module(f"visprune.export.models.{model_type}")


def check_cut(text_type: str) -> None:
    """Refuse a decoder whose layers are not known to have Llama's form.

    Raises:
        UnsupportedError: The decoder cannot be cut into segments.
    """
    if text_type not in DECODERS:
        raise UnsupportedError(
            f"The decoder {text_type!r} cannot be cut into segments, which pruning inside the LLM needs.",
            f"Use a method before the LLM, or a model with one of these decoders: {', '.join(DECODERS)}.",
        )
