"""Look-up of the model to plan for, by a hub id or a checkpoint directory. Only `config.json` is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from visprune.bundled import DEMO, MODEL_DIR
from visprune.errors import CheckpointError, UnsupportedError
from visprune.estimate.known_models import KNOWN
from visprune.estimate.planned_model import ModelSizes, UnprunedModel
from visprune.manifest import MANIFEST
from visprune.optional import require
from visprune.targets import target

__all__ = ["find_model"]


def find_model(model: str | None) -> UnprunedModel:
    """Return a model by its hub id or directory.

    A hub id of `KNOWN` needs no network. The configuration of any other comes from the hub's cache, or from
    the hub.

    Args:
        model: A hub id or a checkpoint directory. None: the bundled demo model.

    Raises:
        CheckpointError: It cannot be found, or its configuration cannot be read.
        UnsupportedError: A model of its kind cannot be exported.
        MissingExtraError: It is a checkpoint, and the `export` extra is not installed.
    """
    if model is None:
        return _of_checkpoint(MODEL_DIR, DEMO)
    if Path(model).exists():
        return _of_checkpoint(Path(model), Path(model).resolve().name)
    if model in KNOWN:
        return KNOWN[model]
    return _of_checkpoint(_config_folder(model), model)


def _config_folder(hub_id: str) -> Path:
    """Return the directory that holds the `config.json` of a hub id, downloaded if it is not in the cache."""
    known = f"known without a network: {', '.join(KNOWN)}."
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise CheckpointError(
            f"There is no directory {hub_id}, and it is not a hub id.", f"Give a directory, or an id; {known}"
        )
    require("huggingface_hub", extra="export")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(hub_id, "config.json")).parent
    except Exception as error:  # the hub's client raises many kinds, and each means the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"The config.json of {hub_id} is not in the hub's cache and could not be downloaded: {reason}",
            f"Check the id and the network, or give a directory; {known}",
        ) from None


def _of_checkpoint(path: Path, name: str) -> UnprunedModel:
    """Return the model that the configuration in a directory describes; the weights need not be there."""
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json and no {MANIFEST}.",
            "Give the directory of a Hugging Face checkpoint, or of a bundle.",
        )
    for module in ("torch", "transformers"):
        require(module, extra="export")
    import torch

    from visprune.export import models
    from visprune.export.checkpoint import loading
    from visprune.export.checkpoint.find import configuration
    from visprune.export.files.located import Located
    from visprune.export.graph import weightless
    from visprune.export.models.parts import cache_shape

    loading.silence_transformers()
    config: Any = loading.load_config(configuration(Located(path, name)))
    features = models.family(config.model_type).features(config)
    bare, _ = weightless.skeleton(config, config.model_type, target("onnxruntime"), torch.float32)
    shapes = loading.shapes(bare, features)
    if shapes is None:
        raise UnsupportedError(
            f"The decoder of {name} has experts or other MLPs that no formula here counts.",
            "Export it and measure it.",
        )
    text = config.text_config
    num_kv_heads, head_dim = cache_shape(text)
    sizes = ModelSizes(name, shapes, num_kv_heads, head_dim, text.max_position_embeddings)
    return UnprunedModel(sizes, features)
