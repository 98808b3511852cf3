"""The model of a checkpoint as PyTorch modules without weights.

It is built twice: once as it is on disk, with its parameters on the meta device, from which they are read on
demand; and once as a skeleton in the target's dtype and attention flavour, which is traced.
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
from visprune.export.checkpoint.loading import read_config
from visprune.export.checkpoint.transformers_errors import reason_of
from visprune.export.checkpoint.weights import Weights, stored_dtype
from visprune.export.graph import attention, graphs
from visprune.export.graph.trace import GraphInput
from visprune.export.graph.used_weights import used_tensors
from visprune.targets import Target
from visprune.targets import target as find_target

__all__ = ["check_decoder", "load_model", "open_model", "skeleton"]


def open_model(checkpoint: Checkpoint) -> tuple[Any, Weights]:
    """Build the model without reading its parameters.

    Returns:
        The model in eval mode, with its parameters on the meta device and its buffers in memory; and the
        weights, which read the parameters.

    Raises:
        CheckpointError: Weights are missing or do not fit the configuration.
        UnsupportedError: The decoder's attention cannot be replaced, or an adapter does not fit the model.
    """
    auto = getattr(transformers, models.family(checkpoint.model_type).AUTO_CLASS)
    config = read_config(checkpoint)
    hook = register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type] # may give one
    try:
        with no_init_weights():
            model = auto._from_config(config, dtype=stored_dtype(checkpoint.tensors)).eval()
    except Exception as error:  # a field is checked only where it is used, with errors of any type
        raise CheckpointError(
            f"The model of {checkpoint.path} cannot be built from its configuration: {reason_of(error)}",
            "Correct config.json.",
        ) from None
    finally:
        hook.remove()
    check_decoder(model)
    unused = partial(_unused_names, config, checkpoint.model_type)
    return model, Weights(model, checkpoint.tensors, checkpoint.path, unused, checkpoint.adapters)


def _unused_names(config: Any, model_type: str) -> set[str]:
    """Return the names of tensors of the vision tower on which no visual token depends.

    These are norms, heads and later layers.
    """
    family = models.family(model_type)
    features = family.features(config)
    tower = models.tower(config.vision_config.model_type)
    model, fake = skeleton(config, model_type, find_target("onnxruntime"), torch.float32)
    size = features.image_size
    pixels = GraphInput("pixel_values", (1, features.channels, size, size), torch.float32, {})
    with fake:
        parts = family.parts(model)
        used = used_tensors(graphs.VisionEncoder(parts, tower, features, ()).eval(), [pixels])
    unused = {id(t) for t in parts.tower.state_dict(keep_vars=True).values()} - {id(t) for t in used}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in unused}


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Move a new parameter to the meta device; buffers stay, because their values may be in no file."""
    return None if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)


def check_decoder(model: Any) -> None:
    """Refuse a decoder whose attention cannot be replaced.

    Raises:
        UnsupportedError: The decoder does not use the attention interface of transformers.
    """
    if not model.model.language_model._supports_attention_backend:
        raise UnsupportedError(
            f"The decoder {model.config.text_config.model_type!r} lacks transformers' attention interface.",
            "Choose a model with another decoder, such as llama, qwen2 or mistral.",
        )


def load_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Any:
    """Load the whole model into memory, in eval mode.

    Args:
        checkpoint: The model.
        dtype: Dtype of its parameters; None for the one that each has on disk.

    Raises:
        CheckpointError: Weights are missing or do not fit the configuration.
        UnsupportedError: The decoder's attention cannot be replaced, or an adapter does not fit the model.
    """
    model, weights = open_model(checkpoint)
    weights.fill(model, dtype)
    return model


def skeleton(config: Any, model_type: str, target: Target, dtype: torch.dtype) -> tuple[Any, FakeTensorMode]:
    """Build the model with fake weights, in a dtype and a target's attention flavour.

    Returns:
        The model in eval mode, and the mode in which its fake tensors can be used.
    """
    attention.register()
    auto = getattr(transformers, models.family(model_type).AUTO_CLASS)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # Fake weights need no initialisation, and some of it reads values, which they do not have.
    with fake, no_init_weights():
        model = auto._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention.IMPLEMENTATION[target.flavour]
        )
    return model.eval(), fake
