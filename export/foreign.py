"""Checkpoints that are not the plain weights of a Hugging Face LLaVA: named for what they are.

Adapters, quantized weights, weights in the format of the original LLaVA repository or of another framework.
Each is refused with what to do about it, because "a tensor is missing" would help nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.files import read_object

__all__ = ["check_adapter", "check_config", "check_names", "missing", "no_weights", "unwrapped"]

# Marks of LLaVA checkpoints in the format of the original repository.
_ORIGINAL_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_QUANTIZED_NAMES = (  # of GPTQ and AWQ, compressed-tensors and FP8, bitsandbytes, MLX, HQQ
    *(".qweight", ".qzeros", ".g_idx"),
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_shape", ".weight_zero_point"),
    *(".SCB", ".weight_format", ".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"),
    *(".scales", ".biases", ".W_q"),
)
_ADAPTER_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector")
# What wrappers put into names: torch.compile, FSDP, activation checkpointing, Lightning.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# What PEFT and DataParallel put in front of them.
_PREFIXES = ("base_model.model.", "module.")
_OTHER_FILES = {
    "*.gguf": "GGUF of llama.cpp",
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "*.onnx": "ONNX",
    "*.npz": "NumPy or MLX",
    "consolidated*.safetensors": "Mistral's own format",
}


def check_adapter(path: Path) -> None:
    """Refuse a directory that holds an adapter, with base weights beside it or alone.

    Raises:
        UnsupportedError: It does.
    """
    config = path / "adapter_config.json"
    weights = [*path.glob("adapter_model*.safetensors"), *path.glob("adapter_model*.bin")]
    if not config.is_file() and not weights:
        return
    said = read_object(config)
    kind = said.get("peft_type")
    base = said.get("base_model_name_or_path")
    name = f"an adapter ({kind})" if isinstance(kind, str) else "an adapter"
    of = f" of {base}" if isinstance(base, str) and base else ""
    raise _is_adapter(f"{path} holds {name}{of} in {(config if config.is_file() else weights[0]).name}")


def _is_adapter(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what}, and adapters are not merged here: the base weights alone would be another model.",
        "Merge it first: load base and adapter with peft, call merge_and_unload(), save_pretrained() into a "
        "new directory, and export that.",
    )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what a configuration says is in another format, or quantized.

    Raises:
        UnsupportedError: It is.
    """
    listed = config.get("architectures")
    architectures = [str(name) for name in listed] if isinstance(listed, list) else []
    causal = any(name.startswith("Llava") and name.endswith("ForCausalLM") for name in architectures)
    marked = any(key in config for key in _ORIGINAL_KEYS)
    # Converted checkpoints may keep such keys: their class, or their two configurations, tell.
    converted = any(name.endswith("ForConditionalGeneration") for name in architectures) or (
        not architectures and isinstance(config.get("text_config"), dict) and "vision_config" in config
    )
    if causal or (marked and not converted):
        raise UnsupportedError(
            f"{path} is a LLaVA checkpoint in the original format, not in the Hugging Face format.",
            "Take the converted one, such as llava-hf/llava-1.5-7b-hf for liuhaotian/llava-v1.5-7b.",
        )
    for place in ("", "text_config", "vision_config"):
        part = config.get(place) if place else config
        for key in _QUANTIZATION_KEYS:
            if isinstance(part, Mapping) and part.get(key):
                raise quantized(f"{path} ({key} in {place or 'config.json'})")


def quantized(what: str) -> UnsupportedError:
    """What to raise of weights that are quantized already."""
    return UnsupportedError(
        f"{what} holds quantized weights.", "Export the unquantized checkpoint, and quantize the bundle."
    )


def check_names(path: Path, names: Collection[str]) -> None:
    """Refuse weights whose names say that they are quantized, or parts of an adapter.

    Raises:
        UnsupportedError: They are.
    """
    for name in names:
        if set(name.split(".")) & set(_ADAPTER_PARTS):
            raise _is_adapter(f"{path} has the weights of an adapter among its own ({name})")
        if name.endswith(_QUANTIZED_NAMES):
            raise quantized(f"{path} (see its tensor {name})")


def no_weights(path: Path) -> CheckpointError:
    """What to raise of a directory without the files that weights are read from."""
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    pickles = [file for file in pickles if file.name != "training_args.bin"]
    if pickles:
        return CheckpointError(
            f"{path} has its weights as pickles ({pickles[0].name}), which are never loaded.",
            "Convert them to safetensors: load and save the model once with transformers.",
        )
    for pattern, kind in _OTHER_FILES.items():
        if found := sorted(path.glob(pattern)):
            return CheckpointError(
                f"{path} has its weights for another framework: {found[0].name} ({kind}).",
                "Take the checkpoint in the Hugging Face format, with model.safetensors.",
            )
    if found := sorted(path.glob("*.safetensors")):
        return CheckpointError(
            f"{path} has no model.safetensors, and {found[0].name} is no name that transformers reads.",
            "If that file holds all weights, rename it to model.safetensors.",
        )
    return CheckpointError(f"{path} has no weights.", "Download model.safetensors into it.")


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers of modules put into it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def missing(
    where: Path, lacking: Collection[str], known: Collection[str], stored: Collection[str]
) -> CheckpointError:
    """What to raise of weights that lack tensors of the model.

    Args:
        where: The checkpoint.
        lacking: Names in the model that no tensor has.
        known: Names in the model that a tensor has.
        stored: Names on disk.
    """
    first = min(lacking)
    what = f"The weights of {where} lack {len(lacking)} of {len(lacking) + len(known)} tensors: {first}"
    if len(lacking) > len(known):
        there = f"has names such as {min(stored)} and {max(stored)}" if stored else "has no tensor"
        return CheckpointError(
            f"{what} is expected, for instance, and the checkpoint {there}.",
            "Take the weights that belong to this config.json, or have transformers write its own names: "
            "load the model there, and save it.",
        )
    if first == "lm_head.weight":
        return CheckpointError(
            f"{what}.",
            "If the embedding is the head too, set tie_word_embeddings in config.json; else add the tensor.",
        )
    return CheckpointError(
        f"{what}{' is one of them' if len(lacking) > 1 else ''}.",
        "Take the weights that belong to this config.json, with every part of the model in them.",
    )
