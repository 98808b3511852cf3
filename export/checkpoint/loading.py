"""Load what a checkpoint holds: its configuration, and its modules.

The model is made twice, and both times weightless: once as it is on disk, its weights read when they are
asked for; and once in the target's dtype and attention flavour, to be traced. Tokenizer and processors are
in `processors`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.initialization import no_init_weights

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export import models
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.shards import read_headers
from visprune.export.checkpoint.transformers_errors import first_line, hint
from visprune.export.checkpoint.weights import Weights, stored_dtype
from visprune.export.graph import attention, graphs
from visprune.export.models.parts import Features, cache_shape
from visprune.manifest import Decoder
from visprune.targets import Target
from visprune.targets import target as find_target
from visprune.work import Convention, Shapes

__all__ = [
    "check_decoder",
    "decoder_facts",
    "load_config",
    "load_model",
    "open_model",
    "quiet",
    "room",
    "shapes",
    "skeleton",
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
    config = _read_config(checkpoint)
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


def _read_config(checkpoint: Checkpoint) -> Any:
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


def open_model(checkpoint: Checkpoint) -> tuple[Any, Weights]:
    """The model in eval mode, its parameters on the meta device and its buffers real; and its weights.

    Raises:
        CheckpointError: Weights are missing or do not fit the configuration.
        UnsupportedError: The decoder lacks what an export needs of it.
    """
    stored = read_headers(checkpoint.weights)
    auto = getattr(transformers, models.family(checkpoint.model_type).AUTO_CLASS)
    config = _read_config(checkpoint)
    hook = register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type] # may give one
    try:
        with no_init_weights():
            model = auto._from_config(config, dtype=stored_dtype(stored)).eval()
    except Exception as error:  # fields are looked at only where they are used, and anything is raised there
        raise CheckpointError(
            f"The model of {checkpoint.path} cannot be built from its configuration: {first_line(error)}",
            "Correct config.json.",
        ) from None
    finally:
        hook.remove()
    check_decoder(model)
    return model, Weights(model, stored, checkpoint.path, partial(_unused, config, checkpoint.model_type))


def _unused(config: Any, model_type: str) -> set[str]:
    """Names of the vision tower's tensors that no visual token depends on: norms, heads, later layers."""
    from visprune.export.graph.trace import GraphInput
    from visprune.export.graph.used_weights import used_tensors

    family = models.family(model_type)
    features = family.features(config)
    tower = models.tower(config.vision_config.model_type)
    model, fake = skeleton(config, model_type, find_target("onnxruntime"), torch.float32)
    size = features.image_size
    pixels = GraphInput("pixel_values", (1, features.channels, size, size), torch.float32, {})
    with fake:
        parts = family.parts(model)
        used = used_tensors(graphs.VisionEncoder(parts, tower, features, ()).eval(), [pixels])
    spare = {id(t) for t in parts.tower.state_dict(keep_vars=True).values()} - {id(t) for t in used}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in spare}


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Let go of the memory of a new parameter; a buffer keeps its values, which may be in no file."""
    return None if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)


def check_decoder(model: Any) -> None:
    """Refuse a decoder whose attention cannot be replaced.

    Raises:
        UnsupportedError: Transformers does not run it through its attention interface.
    """
    if not model.model.language_model._supports_attention_backend:
        raise UnsupportedError(
            f"The decoder {model.config.text_config.model_type!r} lacks transformers' attention interface.",
            "Choose a model with another decoder, such as llama, qwen2 or mistral.",
        )


def load_model(checkpoint: Checkpoint) -> Any:
    """The model in the dtype it has on disk, in eval mode, wholly in memory.

    Raises:
        CheckpointError: Weights are missing or do not fit the configuration.
        UnsupportedError: The decoder lacks what an export needs of it.
    """
    model, weights = open_model(checkpoint)
    weights.fill(model)
    return model


def skeleton(config: Any, model_type: str, target: Target, dtype: torch.dtype) -> tuple[Any, FakeTensorMode]:
    """The model without weights, in a target's dtype and attention flavour, and the mode it lives in."""
    attention.register()
    auto = getattr(transformers, models.family(model_type).AUTO_CLASS)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # Initialisation would be wasted on fake weights, and some of it looks at values they do not have.
    with fake, no_init_weights():
        model = auto._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention.IMPLEMENTATION[target.flavour]
        )
    return model.eval(), fake


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
