"""Checkpoints that are not the plain weights of a Hugging Face LLaVA: named for what they are.

Adapters, quantized weights, weights in the format of the original LLaVA repository or of another framework.
Each is refused with what to do about it, because "a tensor is missing" would help nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.checkpoint.small_files import read_object

__all__ = [
    "check_adapter",
    "check_config",
    "check_names",
    "missing",
    "no_weights",
    "quantized",
    "spare_note",
    "spellings",
]

T = TypeVar("T")

# Marks of LLaVA checkpoints in the format of the original repository.
_ORIGINAL_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_QUANTIZED_NAMES = (  # of GPTQ and AWQ, compressed-tensors and FP8, bitsandbytes, MLX, HQQ
    *(".qweight", ".qzeros", ".g_idx"),
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_shape", ".weight_zero_point"),
    *(".SCB", ".weight_format", ".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"),
    *(".scales", ".biases", ".W_q"),
)
# How parts of names begin that peft and others give to adapters.
_ADAPTER_PARTS = (
    *("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "fourierft_", "adapter_", "adapters"),
    *("prompt_embeddings", "prompt_encoder", "modules_to_save", "original_module", "base_layer"),
)
_ADAPTER_FILES = (
    *("adapter_model*.safetensors", "adapter_model*.bin", "adapters*.safetensors"),
    *("pytorch_lora_weights*.safetensors", "pytorch_lora_weights*.bin", "non_lora_trainables.bin"),
)
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
    weights = [file for pattern in _ADAPTER_FILES for file in path.glob(pattern)]
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
        if any(part.startswith(_ADAPTER_PARTS) for part in name.split(".")):
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


def spellings(stored: Mapping[str, T]) -> list[dict[str, T]]:
    """Tensors under their names; without what wrappers put into these; and without a beginning common to all.

    A spelling that gives two tensors one name is left out.
    """
    plain = {name: _unwrapped(name) for name in stored}
    parts = [name.split(".")[:-1] for name in plain.values()]
    begin = "".join(f"{part}." for part in _common(parts))
    found = [dict(stored)]
    for names in (plain, {name: short.removeprefix(begin) for name, short in plain.items()}):
        spelled = {names[name]: tensor for name, tensor in stored.items()}
        if len(spelled) == len(stored) and spelled.keys() not in [one.keys() for one in found]:
            found.append(spelled)
    return found


def _common(parts: list[list[str]]) -> list[str]:
    """What all lists begin with."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return [column[0] for column in same]


def _unwrapped(name: str) -> str:
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def missing(
    where: Path, lacking: Collection[str], known: Collection[str], spare: Collection[str]
) -> CheckpointError:
    """What to raise of weights that lack tensors of the model.

    Args:
        where: The checkpoint.
        lacking: Names in the model that no tensor has.
        known: Names in the model that a tensor has.
        spare: Names on disk that the model does not have.
    """
    first = min(lacking)
    what = f"The weights of {where} lack {len(lacking)} of {len(lacking) + len(known)} tensors: {first}"
    what += " is one of them" if len(lacking) > 1 else ""
    if spare:
        return CheckpointError(
            f"{what}; they have {len(spare)} that the model does not, such as {min(spare)}.",
            "Take the weights that belong to this config.json. If names alone differ, rename the tensors.",
        )
    if first == "lm_head.weight" and "model.language_model.embed_tokens.weight" in known:
        return CheckpointError(
            f"{what}.",
            "If the embedding is the head too, set tie_word_embeddings in config.json; else add the tensor.",
        )
    return CheckpointError(
        f"{what}.", "Take the weights that belong to this config.json, with every part of the model in them."
    )


def spare_note(spare: Collection[str]) -> tuple[str, ...]:
    """What to say of stored tensors that the model does not have; buffers of older versions are none."""
    odd = [name for name in spare if not name.endswith(("position_ids", "inv_freq"))]
    if not odd:
        return ()
    return (
        f"The weights have {len(odd)} tensors that the model of config.json does not, such as {min(odd)}; "
        "they are not exported.",
    )
