"""Tiny random LLaVA checkpoints in the original format, as LLaVA's own training code writes them.

`write` makes a model of transformers and writes its values under original names, with an original
configuration. Names and configuration were written from published checkpoints, independently of the
translation that is tested.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import Tiny, config
from original_files import BYTES, ROWS, SPECIALS, store, unused_token, write_json, write_tokenizer
from original_tower import name_in_tower, position_ids, randomized, write_tower

__all__ = ["Original", "Written", "original_config", "original_names", "write"]

_FAMILIES = {"pad": "llava", "anyres": "llava_next", "anyres_max_9": "llava_onevision"}
_CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
_TEXTS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_ROPE_THETA = {"llama": 1e4, "llama3": 5e5, "mistral": 1e6, "qwen2": 1e6}
# Tiles as (rows, columns). The first set is another one with rows and columns exchanged.
_GRID = ((2, 1), (1, 2), (2, 2), (1, 3), (1, 4))
_LARGE_GRID = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))


@dataclasses.dataclass(frozen=True)
class Original:
    """What may vary in a checkpoint of the original format.

    Attributes:
        model_type: llava, llava_llama, llava_mistral or llava_qwen.
        aspect: `image_aspect_ratio`: pad, anyres or anyres_max_9.
        siglip: Whether the tower is SigLIP; else it is CLIP.
        llama3: Whether a llava_llama is Llama 3, with its tokenizer.
        inside: Whether the checkpoint holds the tower.
        storage: safetensors, shards, pickle or pickled shards.
        tower_storage: The same for the directory of the tower, whose tensors are float32.
        dtype: Of the stored tensors.
        tied: Whether the embedding is the head too.
        pinpoints_as_text: Whether the tiles are written as a range, "(1x1),...,(6x6)".
        seed: Of the weights.
    """

    model_type: str = "llava"
    aspect: str = "pad"
    siglip: bool = False
    llama3: bool = False
    inside: bool = True
    storage: str = "safetensors"
    tower_storage: str = "safetensors"
    dtype: str = "float16"
    tied: bool = False
    pinpoints_as_text: bool = False
    seed: int = 0

    @property
    def decoder(self) -> str:
        """llama, llama3, mistral or qwen2."""
        return "llama3" if self.llama3 else _TEXTS[self.model_type]

    @property
    def tiny(self) -> Tiny:
        """The same as a checkpoint in the format of transformers."""
        specials = SPECIALS.get(self.decoder)
        theta = (("rope_type", "default"), ("rope_theta", _ROPE_THETA[self.decoder]))
        text = {
            "vocab_size": ROWS,
            "bos_token_id": BYTES if specials else 1,
            "eos_token_id": BYTES + len(specials) - 1 if specials else 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6 if self.model_type == "llava_qwen" else 1e-5,
            "rope_parameters": theta,
        }
        if self.model_type == "llava_mistral":
            text["sliding_window"] = None
        return Tiny(
            family=_FAMILIES[self.aspect],
            tower="siglip" if self.siglip else "clip",
            text=_TEXTS[self.model_type],
            strategy="full" if self.siglip else "default",
            feature_layer=-1 if self.siglip else -2,
            kv_heads=4 if self.decoder == "llama" else 2,
            margin=6 if self.siglip else 0,
            tower_hidden=24,
            tied=self.tied,
            text_extra=tuple(text.items()),
            pinpoints=_GRID if self.aspect == "anyres" else _LARGE_GRID,
        )


@dataclasses.dataclass(frozen=True)
class Written:
    """A checkpoint on disk.

    Attributes:
        path: The checkpoint.
        tower: The directory that its `mm_vision_tower` names. The weights there are those of the model only
            if the checkpoint holds no tower.
        model: transformers' model in float32, with the values that are stored. Its image token is that of a
            byte that texts do not contain.
    """

    path: Path
    tower: Path
    model: Any


def write(path: Path, original: Original, tower: Path | None = None) -> Written:
    """Write a checkpoint and the directory of its tower.

    Args:
        path: The directory of the checkpoint, which is made.
        original: Its form.
        tower: The directory of the tower, which is made; by default beside the checkpoint.
    """
    tower = tower or path.with_name(f"{path.name}-tower")
    path.mkdir(parents=True)
    settings, stored = config(original.tiny), getattr(torch, original.dtype)
    settings.image_token_id = unused_token(original.decoder)
    name = f"{_CLASSES[settings.model_type]}ForConditionalGeneration"
    model = randomized(getattr(transformers, name)(settings), original.seed)
    own = None if original.inside else model
    write_tower(tower, settings.vision_config, own, storage=original.tower_storage, seed=original.seed + 1)
    with torch.no_grad():
        model.lm_head.weight[settings.image_token_id] = 0  # so that no answer has this token
        for name, parameter in model.named_parameters():
            if original.inside or "vision_tower" not in name:
                parameter.copy_(parameter.to(stored))
    weights = {
        name: tensor.to(stored).clone()
        for name, tensor in original_names(model.state_dict()).items()
        if (original.inside or "vision_tower" not in name) and not (original.tied and "lm_head" in name)
    }
    weights |= _buffers(settings, inside=original.inside)
    store(path, weights, original.storage)
    write_json(path / "config.json", original_config(original, settings, tower))
    ends = settings.text_config.eos_token_id
    if original.model_type == "llava_qwen":
        ends = [ends, settings.text_config.bos_token_id]
    write_json(path / "generation_config.json", {"eos_token_id": ends, "do_sample": True, "top_k": 20})
    write_tokenizer(path, original.decoder)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends, 0
    return Written(path, tower, model)


def original_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of a model of transformers under their original names."""
    found = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.").removeprefix("language_model.")
        if short.startswith("vision_tower."):
            short = f"vision_tower.vision_tower.vision_model.{name_in_tower(name)}"
        short = short.replace("multi_modal_projector.linear_1.", "mm_projector.0.")
        short = short.replace("multi_modal_projector.linear_2.", "mm_projector.2.")
        found[short if short.startswith("lm_head.") else f"model.{short}"] = tensor
    return found


def original_config(original: Original, settings: Any, tower: Path) -> dict[str, Any]:
    """Return the content of config.json for a model with the configuration `settings`.

    Args:
        original: The form of the checkpoint.
        settings: Configuration of the model of transformers.
        tower: The directory that `mm_vision_tower` names.
    """
    text, old = settings.text_config, original.decoder == "llama"
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    names += ("initializer_range", "bos_token_id", "eos_token_id")
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}[text.model_type]
    found = {name: getattr(text, name) for name in names} | {
        "_name_or_path": "./checkpoints/somewhere",
        "architectures": [f"Llava{kind}ForCausalLM"],
        "model_type": original.model_type,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": original.aspect,
        "mm_hidden_size": settings.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "rope_scaling": None,
        "tie_word_embeddings": original.tied,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": original.dtype,
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": original.inside,
        "use_cache": True,
        "use_mm_proj": True,
    }
    if not old:  # configurations of Vicuna do not have it
        found["rope_theta"] = _ROPE_THETA[original.decoder]
    if original.model_type == "llava_mistral":
        found["sliding_window"] = None
    if original.model_type == "llava_qwen":
        found |= {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 1}
        found["mm_tunable_parts"] = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    if original.aspect == "pad":
        return found if old else found | {"mm_patch_merge_type": "flat", "image_grid_pinpoints": None}
    sizes = settings.image_grid_pinpoints
    grid = "(1x1),...,(6x6)" if original.pinpoints_as_text else [[width, height] for height, width in sizes]
    return found | {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": grid}


def _buffers(settings: Any, *, inside: bool) -> dict[str, Any]:
    """Return buffers that older versions of transformers stored too, by their original names."""
    text = settings.text_config
    half = text.hidden_size // text.num_attention_heads // 2
    layers = [f"model.layers.{index}.self_attn" for index in range(text.num_hidden_layers)]
    found = {f"{layer}.rotary_emb.inv_freq": torch.rand(half) for layer in layers}
    if inside:
        name = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
        found[name] = position_ids(settings.vision_config)
    return found
