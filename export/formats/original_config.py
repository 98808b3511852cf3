"""The configuration of a checkpoint in LLaVA's original format, translated to that of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.files.small_files import shown
from visprune.export.formats.original_images import pinpoints
from visprune.export.formats.vision_towers import VisionTower

__all__ = ["check", "is_original", "translate"]

# Decoder of each `model_type` of the original format.
_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
# Beginning of the part between Llava and ForCausalLM in the class names of each decoder.
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}
# Keys of config.json that mark the original format.
_MARKS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_FEATURES = {"patch": "default", "cls_patch": "full"}
_PROJECTORS = ("mlp2x_gelu",)


def is_original(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is in the original format.

    A converted checkpoint may keep keys of the original one. It is recognised by its class, or else by its
    separate configurations of text and vision.
    """
    listed = config.get("architectures")
    architectures = [str(name) for name in listed] if isinstance(listed, list) else []
    if any(name.startswith("Llava") and name.endswith("ForCausalLM") for name in architectures):
        return True
    converted = any(name.endswith("ForConditionalGeneration") for name in architectures) or (
        not architectures and isinstance(config.get("text_config"), dict) and "vision_config" in config
    )
    return not converted and any(key in config for key in _MARKS)


def translate(
    where: Path, config: Mapping[str, Any], tower: VisionTower, image_token_id: int, video_token_id: int
) -> dict[str, Any]:
    """Return the configuration in transformers' form.

    Args:
        where: The checkpoint, for messages.
        config: Content of its config.json, which passed `check`.
        tower: Its vision tower.
        image_token_id: Id of the placeholder for an image, which the original format does not have.
        video_token_id: Id of the placeholder for a video.

    Raises:
        CheckpointError: The grid pinpoints make no sense.
    """
    vision = dict(tower.config)
    siglip = vision["model_type"] == "siglip_vision_model"
    whole = vision["model_type"] != "clip_vision_model"  # the last output, of a tower without a class token
    if siglip:
        # The original code removes the last layer of a SigLIP tower, and takes what the others put out.
        vision |= {
            "num_hidden_layers": vision.get("num_hidden_layers", 12) - 1,
            "vision_use_head": False,
        }
    decoder, family = _DECODERS[config["model_type"]], _family(where, config)
    layer, feature = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature", "patch")
    tied = bool(config.get("tie_word_embeddings", False))
    found: dict[str, Any] = {
        "model_type": family,
        "vision_config": vision,
        "text_config": {**_decoder_settings(config), "model_type": decoder, "tie_word_embeddings": tied},
        "vision_feature_layer": -1 if whole else layer,
        "vision_feature_select_strategy": "full" if whole else _FEATURES[feature],
        "projector_hidden_act": "gelu",
        "image_token_index": image_token_id,
        "tie_word_embeddings": tied,
    }
    if family != "llava":
        found["image_grid_pinpoints"] = pinpoints(where, config, vision.get("image_size", 0))
    if family == "llava_onevision":
        found["vision_aspect_ratio"] = config["image_aspect_ratio"]
        found["video_token_index"] = video_token_id
    return found


def check(where: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings under which the model computes something that is not implemented here.

    Args:
        where: The checkpoint, for messages.
        config: Content of its config.json.

    Raises:
        CheckpointError: A number is no whole number, or two settings contradict each other.
        UnsupportedError: A setting is not supported.
    """
    known = {
        "model_type": (None, tuple(_DECODERS)),
        "mm_projector_type": ("linear", _PROJECTORS),
        "mm_vision_select_feature": ("patch", tuple(_FEATURES)),
    }
    for key, (default, values) in known.items():
        if config.get(key, default) not in values:
            raise _unsupported(where, key, config.get(key, default), values)
    _family(where, config)
    _check_class(where, config)
    for key in ("mm_vision_select_layer", "vocab_size", "mm_hidden_size"):
        if type(config.get(key, 0)) is not int:
            raise CheckpointError(
                f"{where} has {key} = {shown(config[key])}, which is no whole number.", "Correct config.json."
            )
    for key in ("mm_resampler_type", "s2", "mm_use_im_start_end", "mm_vision_select_layers"):
        if config.get(key):
            raise UnsupportedError(
                f"{where} is in LLaVA's original format and has {key} = {shown(config[key])} in its "
                "config.json, which is not supported.",
                "Only models without it can be exported; look for a converted checkpoint of the same model.",
            )


def _check_class(where: Path, config: Mapping[str, Any]) -> None:
    """Refuse a class name of another decoder than that of the model type: one of the two must be wrong."""
    listed = config.get("architectures")
    for name in listed if isinstance(listed, list) else []:
        match = re.fullmatch(r"Llava(\w+)ForCausalLM", str(name))
        if match and not match[1].startswith(_CLASSES[_DECODERS[config["model_type"]]]):
            raise CheckpointError(
                f"The config.json of {where} has the class {name} and the model_type {config['model_type']}.",
                "Correct model_type, which decides how the decoder is read.",
            )


def _family(where: Path, config: Mapping[str, Any]) -> str:
    """Return the family of transformers that shows images as this configuration says."""
    ratio, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type") or "flat"
    tiled = ratio == "anyres" or re.fullmatch(r"anyres_max_[1-9]\d{0,3}", str(ratio))
    if not tiled:
        if ratio not in (None, "square", "pad"):
            known = ("square", "pad", "anyres", "anyres_max_N")
            raise _unsupported(where, "image_aspect_ratio", ratio, known)
        return "llava"
    if merge != "spatial_unpad":
        raise _unsupported(where, "mm_patch_merge_type", merge, ("spatial_unpad",))
    return "llava_next" if ratio == "anyres" else "llava_onevision"


def _decoder_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the decoder, which stand among those of LLaVA and of its training."""
    others = ("mm_", "image_", "vision_", "tune_", "freeze_", "unfreeze_", "use_mm_", "tokenizer_", "s2")
    named = {"architectures", "model_type", "auto_map", "transformers_version", "_name_or_path"}
    return {key: value for key, value in config.items() if key not in named and not key.startswith(others)}


def _unsupported(where: Path, key: str, value: object, known: tuple[str, ...]) -> UnsupportedError:
    return UnsupportedError(
        f"{where} is in LLaVA's original format and has {key} = {shown(value)} in its config.json, which is "
        "not supported.",
        f"Supported: {', '.join(known)}.",
    )
