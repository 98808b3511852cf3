"""The vision tower of a checkpoint in LLaVA's original format: its configuration, image settings and weights.

Such a checkpoint names its tower by a hub id or a path. Its weights are inside the checkpoint if they were
trained, and else only where the name says. Its configuration is never inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError, UsageError
from visprune.export.files.located import HUB_ID, Located, locate
from visprune.export.files.shards import find_files, read_headers
from visprune.export.files.small_files import IMAGE_PROCESSOR, file_exists, read_json_object
from visprune.export.files.stored import TensorSource
from visprune.export.formats import llava_hr

__all__ = ["VisionTower", "find_tower", "used_tensors"]

_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
# The configurations of the towers that LLaVA is published with, by the last part of their names.
_KNOWN: Mapping[str, Mapping[str, Any]] = {
    "clip-vit-large-patch14-336": _CLIP_LARGE | {"image_size": 336},
    "clip-vit-large-patch14": _CLIP_LARGE | {"image_size": 224},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size"),
)
_PATCHES = "embeddings.patch_embedding.weight"  # every tower has it
_HINT = "Give the directory or the hub id of its vision tower with --vision-tower."


@dataclass(frozen=True, slots=True)
class VisionTower:
    """A vision tower.

    Attributes:
        name: As the checkpoint or the user names it.
        config: Its configuration, in transformers' form.
        image_settings: Content of its preprocessor_config.json; empty if there is none.
        tensors: Its weights, by the names that transformers knows; empty if they are inside the checkpoint.
        files: The files with these weights.
        revision: The commit of a hub id.
    """

    name: str
    config: Mapping[str, Any]
    image_settings: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorSource] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    revision: str | None = None


def find_tower(
    place: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, TensorSource] | None,
    given: str | Path | None,
    *,
    pickles: bool,
    download: bool,
) -> VisionTower:
    """Find the vision tower of a checkpoint.

    Args:
        place: The checkpoint.
        config: Its configuration, in the original format.
        stored: Its tensors, by their names on disk; None if no weights are wanted.
        given: The tower that the user gives, a directory or a hub id.
        pickles: Whether pickled weights may be read.
        download: Whether files may be downloaded.

    Raises:
        CheckpointError: There is no tower, or its files cannot be read.
        UnsupportedError: It has no configuration of a known kind.
        UsageError: A tower is given for a LLaVA-HR, which has its own.
    """
    inside = stored is None or any(
        name.startswith("model.vision_tower.") and name.endswith(_PATCHES) for name in stored
    )
    if llava_hr.is_llava_hr(config):
        if given is not None:
            raise UsageError(
                f"{place} is a LLaVA-HR, which has its two towers inside.", "Leave --vision-tower out."
            )
        return VisionTower(llava_hr.NAME, llava_hr.vision_config(config))
    name = given or config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(name, (str, Path)) or not str(name):
        raise CheckpointError(f"{place} names no vision tower (mm_vision_tower in config.json).", _HINT)
    known = _KNOWN.get(Path(name).name)
    found = _located(
        place,
        str(name),
        given is not None,
        needed=not inside or known is None,
        pickles=pickles,
        download=download,
    )
    if found is None:
        return VisionTower(str(name), known or {})
    if not file_exists(found.path / "config.json"):
        raise CheckpointError(f"The vision tower {found.path} has no config.json.", _HINT)
    said = read_json_object(found.path / "config.json")
    vision = _vision_config(found, said)
    settings = read_json_object(found.path / IMAGE_PROCESSOR)
    if inside:
        return VisionTower(found.name, vision, settings)
    files, index = find_files(found.path, pickles)
    tensors = _renamed(read_headers(files, index))
    _check_tensors(found, vision, tensors)
    return VisionTower(found.name, vision, settings, tensors, files, found.revision)


def used_tensors(tower: VisionTower, vision: Mapping[str, Any]) -> dict[str, TensorSource]:
    """Return the weights of a tower from another place, without its head and layers that the model lacks.

    Args:
        tower: The tower.
        vision: Its configuration in the model.
    """
    layers = vision.get("num_hidden_layers", 12)

    def used(name: str) -> bool:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        return ".head." not in name and (layer is None or int(layer[1]) < layers)

    return {name: tensor for name, tensor in tower.tensors.items() if used(name)}


def _located(
    place: Path, name: str, is_given: bool, *, needed: bool, pickles: bool, download: bool
) -> Located | None:
    """Return the directory of a tower, or None if it is not needed and not at hand."""
    for path in [Path(name)] if is_given else [Path(name), place / name]:
        if path.is_dir():
            return locate(path)
    if is_given:
        return locate(name, pickles=pickles, download=download)
    if not needed:
        return None
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{place} names the vision tower {name[:200]}, and there is no such directory.", _HINT
        )
    try:
        return locate(name, pickles=pickles, download=download)
    except CheckpointError as error:
        raise CheckpointError(
            f"The vision tower of {place} is not inside the checkpoint: {error.what}",
            f"{_HINT} {error.hint}",
        ) from None


def _vision_config(found: Located, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the vision part of a CLIP or SigLIP model, or of such a part alone."""
    kind = str(said.get("model_type", ""))
    if kind in ("clip", "siglip"):
        part = said.get("vision_config")
        vision = {**(part if isinstance(part, dict) else {}), "model_type": f"{kind}_vision_model"}
    elif kind in ("clip_vision_model", "siglip_vision_model"):
        vision = dict(said)
    else:
        raise UnsupportedError(
            f"The vision tower {found.name} has the model type {kind!r} in its config.json.",
            "Supported towers: CLIP and SigLIP, whole or their vision part alone.",
        )
    for key in _SIZES:
        size = vision.get(key, 1)
        if not isinstance(size, int) or size < 1:
            raise CheckpointError(
                f"The vision tower {found.name} has {key} {size!r} in its config.json.",
                "Correct it to a whole number above 0.",
            )
    return vision


def _check_tensors(found: Located, vision: Mapping[str, Any], tensors: Mapping[str, TensorSource]) -> None:
    """Refuse a tower whose weights are not those of its configuration, or of something else."""
    name = f"vision_tower.vision_model.{_PATCHES}"
    have = tensors[name].shape if name in tensors else None
    patch = vision.get("patch_size")
    if have is None or len(have) != 4 or (patch is not None and have[2:] != (patch, patch)):
        what = "lacks" if have is None else f"has another shape ({list(have)}) than its config.json says for"
        raise CheckpointError(
            f"The vision tower {found.name} {what} the tensor vision_model.{_PATCHES}.",
            "Give the directory of a CLIP or SigLIP model as transformers saves it, with --vision-tower.",
        )


def _renamed(stored: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Return the tensors of the vision part under the names that they have in a LLaVA checkpoint."""
    part = "vision_model."
    whole = any(name.startswith(part) for name in stored)
    names = {name: name.removeprefix(part) for name in stored if name.startswith(part) or not whole}
    return {f"vision_tower.{part}{short}": stored[name] for name, short in names.items()}
