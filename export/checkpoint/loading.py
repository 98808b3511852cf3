"""The configuration of a checkpoint: read, checked for what cannot be exported, and reduced to facts.

The modules are built by `visprune.export.graph.weightless`; tokenizer and processors are in `processors`.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export import models
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.transformers_errors import first_line, hint
from visprune.export.models.parts import Features, cache_shape
from visprune.manifest import Decoder
from visprune.work import Convention, Shapes

__all__ = [
    "decoder_facts",
    "load_config",
    "quiet",
    "read_config",
    "room",
    "shapes",
    "sliding_window",
]

# Rotary embeddings whose frequencies depend on the length at run time: no static graph holds them.
_DYNAMIC_ROPE = ("dynamic", "longrope")


def quiet() -> None:
    """Transformers' notes on processors and loading are not the user's concern; its errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # It would ask at the terminal whether to run a checkpoint's code, where it was not told.
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def load_config(checkpoint: Checkpoint) -> Any:
    """The configuration, checked for what cannot be exported.

    Raises:
        CheckpointError: It cannot be read.
        UnsupportedError: The decoder's attention or positions cannot be put into a static graph.
    """
    config = read_config(checkpoint)
    if getattr(config.text_config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedError(
            f"The decoder {config.text_config.model_type!r} caps its attention logits, which no exported "
            "attention does.",
            "Choose a model with another decoder, such as llama, qwen2 or mistral.",
        )
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for entry in nested:
        if entry.get("rope_type") in _DYNAMIC_ROPE:
            raise UnsupportedError(
                f"The decoder's rotary embedding is {entry['rope_type']!r}, which changes with the length.",
                "Choose a model with default, linear, llama3 or yarn positions.",
            )
    return config


def read_config(checkpoint: Checkpoint) -> Any:
    """Read the configuration as transformers does, with sizes as plain numbers.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    except Exception as error:  # a config can fail in as many ways as it has fields
        raise CheckpointError(
            f"The configuration of {checkpoint.path} cannot be read: {first_line(error)}",
            hint(error, "Correct config.json."),
        ) from None
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = None  # such as one whose package is not here; it is replaced anyway
    for key in ("image_size", "patch_size"):
        setattr(config.vision_config, key, _edge(getattr(config.vision_config, key, None)))
    return config


def _edge(size: Any) -> Any:
    """One edge of a square that is given by both."""
    pair = isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]
    return size[0] if pair else size


def decoder_facts(config: Any, dtype: str, eos_token_ids: tuple[int, ...]) -> Decoder:
    """What the manifest says of the LLM.

    Args:
        config: Of the decoder.
        dtype: Of the cache.
        eos_token_ids: Tokens that end an answer.
    """
    kv_heads, head_dim = cache_shape(config)
    return Decoder(
        num_layers=config.num_hidden_layers,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        cache_dtype=dtype,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        sliding_window=sliding_window(config),
        eos_token_ids=eos_token_ids,
    )


def room(config: Any) -> int:
    """Most tokens of a sequence whose attention is plainly causal: a decoder's context, or its window."""
    context = int(config.max_position_embeddings)
    return min(sliding_window(config) or context, context)


def sliding_window(config: Any) -> int | None:
    """Positions that some layer of a decoder sees at most; None where all see everything before them."""
    if not hasattr(type(config), "sliding_window"):
        return None  # a field left over from another decoder
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return None if kinds is not None and "sliding_attention" not in kinds else window


def shapes(model: Any, features: Features) -> Shapes | None:
    """The sizes that the work of the model depends on; None where no formula counts its decoder's MLPs."""
    vision, text = model.config.vision_config, model.config.text_config
    parts = models.family(model.config.model_type).parts(model)
    layers = getattr(parts.language_model, "layers", ())
    intermediate = getattr(text, "intermediate_size", None)
    if not isinstance(intermediate, int):
        return None
    # Counted by their weights: gate and up projections may be one matrix, and experts fit no convention.
    weights = {
        sum(linear.weight.numel() for linear in _linears(getattr(layer, "mlp", None))) for layer in layers
    }
    matrix = text.hidden_size * intermediate
    conventions: dict[int, Convention] = {2 * matrix: "F2", 3 * matrix: "F3"}
    convention = conventions.get(weights.pop()) if len(weights) == 1 else None
    if convention is None:
        return None
    patches = features.side * features.side
    return Shapes(
        vision_hidden_size=vision.hidden_size,
        vision_intermediate_size=vision.intermediate_size,
        vision_layers=max(features.layer_counts),
        vision_tokens=features.prefix_tokens + patches,
        vision_patches=patches,
        patch_values=features.channels * vision.patch_size**2,
        projector=tuple((linear.in_features, linear.out_features) for linear in _linears(parts.projector)),
        hidden_size=text.hidden_size,
        intermediate_size=intermediate,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        convention=convention,
    )


def _linears(module: nn.Module | None) -> list[nn.Linear]:
    """The linear layers of a module, in the order it defines them."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)] if module is not None else []
