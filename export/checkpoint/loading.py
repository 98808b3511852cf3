"""The configuration of a checkpoint: reading it, checking it, and what the manifest records of it.

The modules are built by `visprune.export.graph.weightless`; the tokenizer and the image processor are read by
`processors`.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers
from torch import nn

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export import models
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.transformers_errors import hint_for, reason_of
from visprune.export.models.parts import Features, cache_shape
from visprune.manifest import Decoder
from visprune.optional import ignore_future_warnings
from visprune.work import Convention, Shapes

__all__ = [
    "context_limit",
    "decoder_facts",
    "load_config",
    "read_config",
    "shapes",
    "silence_transformers",
    "sliding_window",
]

# Rotary embeddings whose frequencies depend on the length at run time, so that no static graph can hold them.
_DYNAMIC_ROPE = ("dynamic", "longrope")


def silence_transformers() -> None:
    """Turn off transformers' progress bars, warnings and questions; its errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ignore_future_warnings()
    # Otherwise transformers asks at the terminal whether to run a checkpoint's code, if it was not told.
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def load_config(checkpoint: Checkpoint) -> Any:
    """Read the configuration and refuse a decoder that cannot be exported.

    Raises:
        CheckpointError: The configuration cannot be read.
        UnsupportedError: The decoder's attention or positions cannot be put into a static graph.
    """
    config = read_config(checkpoint)
    if getattr(config.text_config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedError(
            f"The decoder {config.text_config.model_type!r} caps its attention logits, which exported graphs "
            "cannot do.",
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
    """Read the configuration as transformers does, with the sizes of a square given as one number.

    Raises:
        CheckpointError: The configuration cannot be read.
    """
    replaced = checkpoint.replaced.get("config.json")
    if replaced is not None:
        models.tower(replaced["vision_config"]["model_type"])  # a tower of our own registers itself
    try:
        if replaced is None:
            config = transformers.AutoConfig.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
            )
        else:
            config = transformers.AutoConfig.for_model(**copy.deepcopy(replaced))
    except Exception as error:  # each field of a configuration can fail with an error of its own type
        raise CheckpointError(
            f"The configuration of {checkpoint.path} cannot be read: {reason_of(error)}",
            hint_for(error, "Correct config.json."),
        ) from None
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = None  # its package may not be installed, and it is replaced anyway
    for key in ("image_size", "patch_size"):
        setattr(config.vision_config, key, _edge(getattr(config.vision_config, key, None)))
    return config


def _edge(size: Any) -> Any:
    """Return one edge of a square whose two edges are given; return anything else unchanged."""
    pair = isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]
    return size[0] if pair else size


def decoder_facts(config: Any, dtype: str, eos_token_ids: tuple[int, ...]) -> Decoder:
    """Return the manifest's entry for the LLM.

    Args:
        config: Configuration of the decoder.
        dtype: Dtype of the cache, such as "float16".
        eos_token_ids: Ids of the tokens that end an answer.
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


def context_limit(config: Any) -> int:
    """Return the most tokens of one sequence: a decoder's context, or its sliding window if that is smaller.

    The exported graphs have no sliding window, so they are right only within it.
    """
    context = int(config.max_position_embeddings)
    return min(sliding_window(config) or context, context)


def sliding_window(config: Any) -> int | None:
    """Return how many positions the windowed layers of a decoder see; None if no layer has a window."""
    if not hasattr(type(config), "sliding_window"):
        return None  # the field is a leftover of another decoder's configuration
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return None if kinds is not None and "sliding_attention" not in kinds else window


def shapes(model: Any, features: Features) -> Shapes | None:
    """Return the sizes from which the model's FLOPs are computed.

    Args:
        model: A model of transformers; its parameters may be on the meta device.
        features: Which of its tokens are visual.

    Returns:
        The sizes, or None if no FLOP convention describes the decoder's MLPs.
    """
    vision, text = model.config.vision_config, model.config.text_config
    parts = models.family(model.config.model_type).parts(model)
    layers = getattr(parts.language_model, "layers", ())
    intermediate = getattr(text, "intermediate_size", None)
    if not isinstance(intermediate, int):
        return None
    # The convention is found by counting weights, because the gate and up projections may be one matrix.
    # Mixtures of experts fit no convention.
    weights = {
        sum(linear.weight.numel() for linear in _linears(getattr(layer, "mlp", None))) for layer in layers
    }
    matrix = text.hidden_size * intermediate
    conventions: dict[int, Convention] = {2 * matrix: "F2", 3 * matrix: "F3"}
    convention = conventions.get(weights.pop()) if len(weights) == 1 else None
    if convention is None:
        return None
    patches, depth = features.side * features.side, max(features.layer_counts)
    return Shapes(
        vision_hidden_size=vision.hidden_size,
        vision_intermediate_size=vision.intermediate_size,
        vision_layers=depth,
        vision_tokens=features.prefix_tokens + patches,
        vision_patches=patches,
        patch_values=parts.tower.embeddings.patch_embedding.weight[0].numel(),
        projector=tuple((linear.in_features, linear.out_features) for linear in _linears(parts.projector)),
        hidden_size=text.hidden_size,
        intermediate_size=intermediate,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        convention=convention,
        vision_other=models.tower(vision.model_type).other_work(parts.tower, depth),
    )


def _linears(module: nn.Module | None) -> list[nn.Linear]:
    """Return the linear layers of a module, in the order in which it defines them."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)] if module is not None else []
