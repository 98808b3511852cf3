"""LLaVA-HR's vision tower in the original format: its configuration and the names of its tensors.

The names of the ConvNeXt are those of timm, except that a layer scale is called `weight` instead of `gamma`.
Those of the ViT are transformers' names for CLIP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.files.stored import ComputedTensor, TensorSource

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MODEL_TYPE",
    "NAME",
    "is_llava_hr",
    "known_name",
    "position_grid",
    "tensors",
    "tower_name",
    "vision_config",
]

MODEL_TYPE = "llava_hr_vision_model"
"""The `model_type` of the tower's configuration."""

NAME = "of LLaVA-HR"
"""Name of the tower, for messages."""

_STRIDE = 32  # pixels for each visual token, along a side
_LEAST_SIZE = 768  # pixels along a side; below, the ViT would have more places than the ConvNeXt

_FAST: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "fast_patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
}
_SLOW: dict[str, dict[str, Any]] = {
    "convnext_large": {
        "slow_depths": [3, 3, 27, 3],
        "slow_hidden_sizes": [192, 384, 768, 1536],
        "slow_layer_norm_eps": 1e-6,
    },
    "convnext_xxlarge": {
        "slow_depths": [3, 4, 30, 3],
        "slow_hidden_sizes": [384, 768, 1536, 3072],
        "slow_layer_norm_eps": 1e-5,
    },
}

_PREFIX = "model.vision_tower."

# Names in the original format, and those of `LlavaHrVisionModel`; None for what it does not have. `{adapter}`
# is the layer of the adapter, and `{last}` the last layer.
_VIT, _CONVNEXT = r"fast_vision_tower\.vision_tower\.vision_model\.", r"slow_vision_tower\.vision_tower\."
_BLOCK, _MADE_BLOCK = _CONVNEXT + r"stages\.(\d+)\.blocks\.(\d+)\.", r"slow_tower.stages.\1.layers.\2."
_NAMES: tuple[tuple[str, str | None], ...] = (
    (_VIT + r"encoder\.layers\.(\d+)\.(.+)", r"layers.\1.encoder.\2"),
    (_VIT + r"(pre_layrnorm\..+|embeddings\.(?:patch|position)_embedding\.weight)", r"\1"),
    (_VIT + r"(?:post_layernorm\..+|embeddings\.(?:class_embedding|position_ids))", None),
    (_CONVNEXT + r"stem\.0\.(.+)", r"slow_tower.embeddings.patch_embeddings.\1"),
    (_CONVNEXT + r"stem\.1\.(.+)", r"slow_tower.embeddings.layernorm.\1"),
    (_CONVNEXT + r"stages\.(\d+)\.downsample\.(.+)", r"slow_tower.stages.\1.downsampling_layer.\2"),
    (_BLOCK + r"conv_dw\.(.+)", _MADE_BLOCK + r"dwconv.\3"),
    (_BLOCK + r"norm\.(.+)", _MADE_BLOCK + r"layernorm.\3"),
    (_BLOCK + r"mlp\.fc([12])\.(.+)", _MADE_BLOCK + r"pwconv\3.\4"),
    (_BLOCK + r"weight", _MADE_BLOCK + r"layer_scale_parameter"),
    (_CONVNEXT + r"head\..+", None),
    (r"align_stages_latent\.(\d+)\.(.+)", r"layers.{adapter}.adapter.\2"),
    (r"align_stages\.0\.(.+)", r"layers.{last}.merge.\1"),
)


def is_llava_hr(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json in the original format is that of a LLaVA-HR."""
    return bool(config.get("is_multipath_encoder"))


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `LlavaHrVisionConfig` for a configuration in the original format.

    `mm_vision_select_layer` has no effect on this tower, in the published code either.

    Raises:
        CheckpointError: The configuration does not say the size of the pictures.
        UnsupportedError: One of the two towers is not known, or pictures of this size, or cut ones, are not
            supported.
    """
    size = config.get("input_image_size")
    if not isinstance(size, int):
        raise CheckpointError(
            f"The input_image_size of this LLaVA-HR is {size!r}.",
            "Correct config.json: it is the number of pixels along a side, for example 1024.",
        )
    if size % _STRIDE or size < _LEAST_SIZE:
        raise UnsupportedError(
            f"This LLaVA-HR takes pictures of {size} x {size} pixels.",
            f"Only sizes of at least {_LEAST_SIZE} pixels and in steps of {_STRIDE} are supported.",
        )
    if config.get("image_aspect_ratio") not in (None, "pad", "square"):
        raise UnsupportedError(
            f"This LLaVA-HR has image_aspect_ratio = {config['image_aspect_ratio']!r}, which cuts pictures.",
            "Only pad and square are supported.",
        )
    return {
        "model_type": MODEL_TYPE,
        "image_size": size,
        "patch_size": _STRIDE,
        **_known(config, "mm_vision_tower", _FAST),
        **_known(config, "vision_tower_slow", _SLOW),
        "adapters": not config.get("freeze_vision", False),
    }


def _known(config: Mapping[str, Any], key: str, towers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the sizes of a tower by the name in `config[key]`, which may be a path or have a suffix."""
    name = str(config.get(key))
    for known, sizes in towers.items():
        if known in name:
            return sizes
    raise UnsupportedError(
        f"The {key} {config.get(key)!r} of this LLaVA-HR is not supported.",
        f"Supported are: {', '.join(towers)}.",
    )


def tower_name(name: str, layers: int) -> str | None:
    """Return the name of a tensor in a `LlavaHrVisionModel`.

    Args:
        name: The name in the original format, without `model.vision_tower.`.
        layers: Layers of the ViT.

    Returns:
        The name; None for a tensor that the model does not have. A name that is not known stays as it is.
    """
    for pattern, made in _NAMES:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        if made is None:
            return None
        places = {"last": layers - 1}
        if "{adapter}" in made:
            places["adapter"] = (int(match[1]) + 1) * layers // 4
        return match.expand(made.format(**places))
    return name


def known_name(name: str, layers: int) -> str:
    """Return the name that transformers knows for a tensor of a checkpoint in the original format.

    The name of a tensor that is not of the tower, or that our tower does not have, is returned as it is.

    Args:
        name: The name in the original format.
        layers: Layers of the ViT.
    """
    made = tower_name(name.removeprefix(_PREFIX), layers) if name.startswith(_PREFIX) else None
    return name if made is None else f"vision_tower.{made}"


def tensors(stored: Mapping[str, TensorSource], vision: Mapping[str, Any]) -> dict[str, TensorSource]:
    """Return the tensors of a checkpoint, those of the tower by the names that transformers knows.

    Tensors of the tower that ours does not have are left out. The position embeddings are resampled to the
    tower's grid when they are read. Other names stay as they are.

    Args:
        stored: All tensors of the checkpoint, by their names in the original format.
        vision: The fields that `vision_config` returns.

    Raises:
        CheckpointError: The position embeddings are not those of a class token and a square of patches.
    """
    found: dict[str, TensorSource] = {}
    for name, tensor in stored.items():
        if not name.startswith(_PREFIX):
            found[name] = tensor
        elif made := tower_name(name.removeprefix(_PREFIX), vision["num_hidden_layers"]):
            is_grid = made == "embeddings.position_embedding.weight"
            found[f"vision_tower.{made}"] = _resampled(tensor, vision) if is_grid else tensor
    return found


def _resampled(embedding: TensorSource, vision: Mapping[str, Any]) -> ComputedTensor:
    """Return the position embeddings of the tower's grid, computed from the stored ones."""
    rows, width = embedding.shape if len(embedding.shape) == 2 else (0, 0)
    if rows < 2 or math.isqrt(rows - 1) ** 2 != rows - 1:
        raise CheckpointError(
            f"The tensor {embedding.name} is {list(embedding.shape)}, which are not the positions of a class "
            "token and a square of patches.",
            "Take the weights from their source again.",
        )
    side = vision["image_size"] // vision["patch_size"]
    return ComputedTensor(
        embedding.name, (embedding,), (side * side, width), lambda sources: position_grid(sources[0], side)
    )


def position_grid(embedding: Tensor, side: int) -> Tensor:
    """Return the position embeddings of a grid of patches, resampled from those that CLIP was trained with.

    Args:
        embedding: [1 + n^2, D], the first of them for the class token.
        side: Patches along a side of the grid.

    Returns:
        [side^2, D] float32, by bicubic resampling with antialiasing, as in the published code.
    """
    from torch.nn import functional

    patches = embedding[1:].float()
    trained = math.isqrt(len(patches))
    grid = patches.T.unflatten(1, (trained, trained)).unsqueeze(0)  # [1, D, n, n]
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return grid.flatten(2).squeeze(0).T
