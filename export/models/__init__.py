"""The model families visprune exports. One file a Hugging Face `model_type`; this is the list.

`MODELS` are whole checkpoints, `TOWERS` the vision encoders inside them. A decoder needs no file: any
that transformers implements through its attention interface is traced as it is. Those of `DECODERS` can
also be cut into segments: their layers have Llama's form, and nothing happens between them.
"""

from __future__ import annotations

import importlib
from typing import Any

from visprune.errors import UnsupportedError

__all__ = ["DECODERS", "MODELS", "TOWERS", "check_cut", "family", "tower"]

MODELS = ("llava", "llava_next", "llava_onevision")
TOWERS = ("clip_vision_model", "siglip_vision_model")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def family(model_type: str) -> Any:
    """The module that knows a checkpoint family.

    Raises:
        UnsupportedError: There is none.
    """
    if model_type not in MODELS:
        raise UnsupportedError(
            f"The model type {model_type!r} is not supported.", f"Supported model types: {', '.join(MODELS)}."
        )
    return importlib.import_module(f"visprune.export.models.{model_type}")


def tower(model_type: str) -> Any:
    """The module that knows a vision tower.

    Raises:
        UnsupportedError: There is none.
    """
    if model_type not in TOWERS:
        raise UnsupportedError(
            f"The vision tower {model_type!r} is not supported.", f"Supported towers: {', '.join(TOWERS)}."
        )
    return importlib.import_module(f"visprune.export.models.{model_type}")


def check_cut(text_type: str) -> None:
    """Refuse a decoder whose layers are not known to have Llama's form.

    Raises:
        UnsupportedError: It cannot be cut into segments.
    """
    if text_type not in DECODERS:
        raise UnsupportedError(
            f"The decoder {text_type!r} cannot be cut into segments, which pruning inside the LLM needs.",
            f"Use a method before the LLM, or a model with one of these decoders: {', '.join(DECODERS)}.",
        )
