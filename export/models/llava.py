"""LLaVA 1.5: one tile for each image, an MLP projector, and any decoder.

The configuration tells which encoder layers the projector takes, and whether the first token is dropped. Its
`vision_feature_layer` is an index into transformers' `hidden_states`, whose entry 0 is the input of the first
layer; -2 therefore means the output of the last layer but one.
"""

from __future__ import annotations

from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export import models
from visprune.export.models.parts import Features, Parts

__all__ = ["AUTO_CLASS", "features", "features_for", "parts"]

AUTO_CLASS = "LlavaForConditionalGeneration"


def parts(model: Any) -> Parts:
    """Return the modules of a loaded `LlavaForConditionalGeneration`."""
    return Parts(
        tower=model.model.vision_tower,
        projector=model.model.multi_modal_projector,
        language_model=model.model.language_model,
        lm_head=model.lm_head,
    )


def features(config: Any) -> Features:
    """Derive from the configuration which hidden states of the tower become visual tokens.

    Raises:
        UnsupportedError: The tower or the selection strategy is not supported.
        CheckpointError: The tower does not have the feature layer, or its sizes give no patches.
    """
    return features_for(config, config.vision_feature_select_strategy)


def features_for(config: Any, strategy: str) -> Features:
    """Return the features for a selection strategy.

    Args:
        config: Configuration of the checkpoint.
        strategy: "default", which drops the tower's first token, or "full".

    Raises:
        UnsupportedError: The tower or the selection strategy is not supported.
        CheckpointError: The tower does not have the feature layer, or its sizes give no patches.
    """
    vision = config.vision_config
    size, patch = vision.image_size, vision.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or not 0 < patch <= size:
        raise CheckpointError(
            f"The vision tower has pictures of {size!r} pixels and patches of {patch!r}.",
            "Correct image_size and patch_size in config.json; pictures must be square.",
        )
    tower = models.tower(vision.model_type)
    prefix = tower.PREFIX_TOKENS
    if strategy not in ("default", "full"):
        raise UnsupportedError(
            f"The feature strategy {strategy!r} is not supported.", "Supported strategies: default, full."
        )
    chosen = config.vision_feature_layer
    depth = vision.num_hidden_layers
    wanted = [chosen] if isinstance(chosen, int) else list(chosen or [])
    if not wanted:
        raise CheckpointError(
            "The configuration names no feature layer.", "Correct vision_feature_layer in config.json."
        )
    indices = []
    for index in wanted:
        if not -depth - 1 <= index <= depth:
            raise CheckpointError(
                f"The configuration takes hidden state {index} of a tower with {depth} layers.",
                "Correct vision_feature_layer in config.json.",
            )
        indices.append(index % (depth + 1))
    return Features(
        layer_counts=tuple(indices),
        prefix_tokens=prefix,
        dropped_tokens=1 if strategy == "default" else 0,
        side=size // patch,
        image_size=size,
        patch_size=patch,
        channels=vision.num_channels,
        resizable=hasattr(tower, "embed_resized"),
    )
