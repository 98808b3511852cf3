"""The configuration of a checkpoint in LLaVA's original format, translated to that of transformers."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.formats.vision_towers import VisionTower

__all__ = ["check", "image_processor", "is_original", "shown", "translate", "video_processor"]

# Decoder of each `model_type` of the original format.
_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
# Beginning of the part between Llava and ForCausalLM in the class names of each decoder.
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}
# Keys of config.json that mark the original format.
_MARKS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_FEATURES = {"patch": "default", "cls_patch": "full"}
_PROJECTORS = ("mlp2x_gelu",)
_COLOURS = {
    "clip_vision_model": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip_vision_model": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}
_IMAGE_CLASSES = {
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
}
_MOST_DIGITS = 2  # of the tiles along a side; published checkpoints have at most 6 tiles
_SHOWN = 200  # characters of a value in a message
_SETTINGS = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")


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
        found["image_grid_pinpoints"] = _pinpoints(where, config, vision.get("image_size", 0))
    if family == "llava_onevision":
        found["vision_aspect_ratio"] = config["image_aspect_ratio"]
        found["video_token_index"] = video_token_id
    return found


def image_processor(
    config: Mapping[str, Any], known: Mapping[str, Any], tower: VisionTower
) -> dict[str, Any]:
    """Return the settings of the image processor, in the form of a preprocessor_config.json.

    Args:
        config: Content of the original config.json.
        known: The translated configuration.
        tower: The vision tower.
    """
    vision = known["vision_config"]
    size = vision["image_size"]
    square = {"height": size, "width": size}
    colours = _COLOURS.get(vision["model_type"], _COLOURS["clip_vision_model"])
    given = {key: value for key, value in tower.image_settings.items() if key in _SETTINGS}
    given = {key: value for key, value in given.items() if value is not None}
    settings: dict[str, Any] = {
        "image_processor_type": _IMAGE_CLASSES[known["model_type"]],
        "do_resize": True,
        "resample": 3,
        **colours,
        **given,
    }
    if known["model_type"] == "llava":
        settings["do_pad"] = config.get("image_aspect_ratio") == "pad"
    else:
        settings["image_grid_pinpoints"] = known["image_grid_pinpoints"]
    crops = known["model_type"] == "llava_next" or (
        known["model_type"] == "llava" and vision["model_type"] != "siglip_vision_model"
    )
    if crops:
        return settings | {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    return settings | {"size": square, "do_center_crop": False}


def video_processor(
    config: Mapping[str, Any], known: Mapping[str, Any], tower: VisionTower
) -> dict[str, Any] | None:
    """Return the settings by which frames of a video are prepared; None if the model takes no videos here.

    Args are those of `image_processor`. Only OneVision's own arrangement is known: tokens are resized to half
    the side, and one newline ends a video.
    """
    usual = (
        config.get("mm_newline_position") in (None, "one_token")
        and config.get("mm_spatial_pool_mode") in (None, "bilinear")
        and config.get("mm_spatial_pool_stride") in (None, 2)
        and not config.get("add_faster_video")
    )
    if known["model_type"] != "llava_onevision" or not usual:
        return None
    settings = image_processor(config, known, tower)
    return {key: settings[key] for key in settings.keys() - {"image_grid_pinpoints"}}


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


def shown(value: object) -> str:
    """Return a value of a configuration as a message shows it: shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


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


def _pinpoints(where: Path, config: Mapping[str, Any], tile: int) -> list[list[int]]:
    """Return the grid pinpoints as pairs (height, width); the original format has (width, height).

    A text is read as the original code reads it: "(1x1),...,(6x6)" counts tiles and stands for all grids
    between the two corners; any other is the list itself.
    """
    given = config.get("image_grid_pinpoints")
    listed: Any = given
    if isinstance(given, str):
        corners = re.findall(r"\((\d+)x(\d+)\)", given)
        if corners and all(len(count) <= _MOST_DIGITS for one in corners for count in one):
            (left, low), (right, high) = (tuple(map(int, one)) for one in (corners[0], corners[-1]))
            counts = [(x, y) for x in range(left, right + 1) for y in range(low, high + 1)]
            listed = [[x * tile, y * tile] for x, y in counts]
        else:
            try:
                listed = ast.literal_eval(given)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                listed = None
    try:
        found = [[height, width] for width, height in listed]
        if not found or any(type(edge) is not int or edge < 1 for pair in found for edge in pair):
            raise ValueError
    except (TypeError, ValueError):
        raise CheckpointError(
            f"The grid pinpoints of {where} are {shown(given)}, and not pairs of a width and a height in "
            "pixels.",
            "Correct image_grid_pinpoints in config.json.",
        ) from None
    return found


def _unsupported(where: Path, key: str, value: object, known: tuple[str, ...]) -> UnsupportedError:
    return UnsupportedError(
        f"{where} is in LLaVA's original format and has {key} = {shown(value)} in its config.json, which is "
        "not supported.",
        f"Supported: {', '.join(known)}.",
    )
