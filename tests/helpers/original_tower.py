"""Vision towers as they are published on their own: CLIP and SigLIP, each with its text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from original_files import store, write_json
from published import CLIP_COLOURS, SIGLIP_COLOURS

__all__ = ["name_in_tower", "position_ids", "randomized", "write_tower"]


def write_tower(
    path: Path, vision: Any, model: Any | None = None, *, storage: str = "safetensors", seed: int = 1
) -> None:
    """Write a vision tower with its text tower, as CLIP and SigLIP are published.

    Args:
        path: The directory, which is made.
        vision: Configuration of the tower inside a model. The published SigLIP has a layer and a head more.
        model: The model whose tower it is; None for random values.
        storage: As in `Original`.
        seed: Of the values that are not the model's.
    """
    path.mkdir(parents=True)
    clip, seen = vision.model_type == "clip_vision_model", vision.to_dict()
    text = {"hidden_size": vision.hidden_size, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    if not clip:
        seen |= {"num_hidden_layers": vision.num_hidden_layers + 1, "vision_use_head": True}
    kind = "CLIP" if clip else "Siglip"
    settings = getattr(transformers, f"{kind}Config")(vision_config=seen, text_config=text)
    weights = randomized(getattr(transformers, f"{kind}Model")(settings), seed).state_dict()
    for name, tensor in {} if model is None else model.state_dict().items():
        if name.startswith("model.vision_tower."):
            weights[f"vision_model.{name_in_tower(name)}"] = tensor
    weights["vision_model.embeddings.position_ids"] = position_ids(vision)
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    store(path, {name: tensor.clone() for name, tensor in weights.items()}, storage)
    names = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    said = {name: getattr(settings.vision_config, name) for name in (*names, "patch_size")}
    said["model_type"] = vision.model_type
    both = {"model_type": kind.lower(), "architectures": [f"{kind}Model"]}
    write_json(path / "config.json", both | {"vision_config": said, "text_config": text})
    size = vision.image_size
    square = {"size": size, "crop_size": size, "do_center_crop": True} | CLIP_COLOURS
    square |= {"feature_extractor_type": "CLIPFeatureExtractor"}
    if not clip:
        square = {"size": {"height": size, "width": size}, "rescale_factor": 1 / 255} | SIGLIP_COLOURS
        square |= {"image_processor_type": "SiglipImageProcessor"}
    shared = {"do_resize": True, "do_normalize": True, "resample": 3}
    write_json(path / "preprocessor_config.json", square | shared)


def randomized(model: Any, seed: int) -> Any:
    """Give a model values that are livelier than those of its initialisation."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.15 if "layer" not in name or "vision" in name else 0.2
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * scale + shift)
    return model.eval()


def position_ids(vision: Any) -> Any:
    """Return the buffer of positions that older versions of transformers stored, [1, N]."""
    patches = (vision.image_size // vision.patch_size) ** 2
    return torch.arange(patches + (vision.model_type == "clip_vision_model"))[None]


def name_in_tower(name: str) -> str:
    """Return the name of a tensor inside the tower."""
    return name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
