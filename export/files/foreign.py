"""Recognition of checkpoints that are not the plain weights of a Hugging Face LLaVA model.

Such a checkpoint is an adapter, is quantized, or is in the format of another framework. Each kind is refused
with its own advice, because "a tensor is missing" would help nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.files.small_files import read_json_object

__all__ = [
    "ADAPTER_CONFIG",
    "check_adapter",
    "check_config",
    "check_names",
    "is_adapter_name",
    "no_weights_error",
    "quantized_error",
]

ADAPTER_CONFIG = "adapter_config.json"
"""The settings of an adapter, as PEFT writes them."""

_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_QUANTIZED_NAMES = (  # line by line: GPTQ and AWQ; compressed-tensors and FP8; bitsandbytes; MLX and HQQ
    *(".qweight", ".qzeros", ".g_idx"),
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_shape", ".weight_zero_point"),
    *(".SCB", ".weight_format", ".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"),
    *(".scales", ".biases", ".W_q"),
)
# Beginnings of the parts of tensor names that PEFT and other libraries give to adapters.
_ADAPTER_PARTS = (
    *("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "fourierft_", "adapter_", "adapters"),
    *("prompt_embeddings", "prompt_encoder", "modules_to_save", "original_module", "base_layer"),
)
_ADAPTER_FILES = (
    *("adapter_model*.safetensors", "adapter_model*.bin", "adapters*.safetensors"),
    *("pytorch_lora_weights*.safetensors", "pytorch_lora_weights*.bin", "non_lora_trainables.bin"),
)
_BASE_FILES = ("model*.safetensors", "pytorch_model*.bin")
# Beginnings of the names of pickles that a training leaves beside the weights.
_TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_OTHER_FILES = {
    "*.gguf": "GGUF of llama.cpp",
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "*.onnx": "ONNX",
    "*.npz": "NumPy or MLX",
    "consolidated*.safetensors": "Mistral's own format",
}


def check_adapter(path: Path, name: str) -> bool:
    """Return whether a directory holds an adapter; refuse one that has no base weights beside it.

    Args:
        path: The directory.
        name: How a user names it.

    Raises:
        CheckpointError: A file of an adapter lies beside a model's weights, without the adapter's settings.
        UnsupportedError: The directory holds an adapter and nothing to merge it into.
    """
    config = path / ADAPTER_CONFIG
    weights = sorted(file for pattern in _ADAPTER_FILES for file in path.glob(pattern))
    if not config.is_file() and not weights:
        return False
    if (path / "config.json").is_file() and any(file for kind in _BASE_FILES for file in path.glob(kind)):
        if not config.is_file():
            raise CheckpointError(
                f"{name} has {weights[0].name} beside its weights, which is a file of an adapter, and no "
                f"{ADAPTER_CONFIG}.",
                f"Remove {weights[0].name} from it, or add the {ADAPTER_CONFIG} of that adapter.",
            )
        return True
    settings = read_json_object(config)
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    what = f"an adapter ({kind})" if isinstance(kind, str) else "an adapter"
    known = isinstance(base, str) and base
    raise UnsupportedError(
        f"{name} holds {what}{f' of {base}' if known else ''} and no model that it could be merged into.",
        f"Give the model that it was trained on: visprune-export {base if known else 'MODEL'} "
        f"--adapter {name}",
    )


def is_adapter_name(name: str) -> bool:
    """Return whether a tensor's name shows that it belongs to an adapter."""
    return any(part.startswith(_ADAPTER_PARTS) for part in name.split("."))


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose config.json says that it is quantized.

    Raises:
        UnsupportedError: The checkpoint is quantized.
    """
    for place in ("", "text_config", "vision_config"):
        part = config.get(place) if place else config
        for key in _QUANTIZATION_KEYS:
            if isinstance(part, Mapping) and part.get(key):
                raise quantized_error(f"{path} ({key} in {place or 'config.json'})")


def quantized_error(what: str) -> UnsupportedError:
    """Return the error for weights that are quantized already.

    Args:
        what: The checkpoint, and where it says so.
    """
    return UnsupportedError(
        f"{what} holds quantized weights.", "Export the unquantized checkpoint, and quantize the bundle."
    )


def check_names(path: Path, names: Collection[str]) -> None:
    """Refuse weights whose tensor names show that they are quantized or belong to an adapter.

    Args:
        path: The checkpoint, for the message.
        names: Names of its tensors.

    Raises:
        UnsupportedError: A tensor is quantized or belongs to an adapter.
    """
    for name in names:
        if is_adapter_name(name):
            raise UnsupportedError(
                f"{path} has the weights of an adapter among its own ({name}).",
                "Merge it with peft's merge_and_unload(), and export what save_pretrained() writes then; or "
                "save the adapter in a directory of its own, and name that with --adapter.",
            )
        if name.endswith(_QUANTIZED_NAMES):
            raise quantized_error(f"{path} (see its tensor {name})")


def no_weights_error(path: Path, pickled: bool = False) -> CheckpointError:
    """Return the error for a directory that has no weight files in the expected format.

    Args:
        path: The directory.
        pickled: Whether pickles were looked for too.
    """
    # Of a hub id only the index is there, unless pickles were asked for.
    kinds = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")
    pickles = sorted(file for kind in kinds for file in path.glob(kind))
    pickles = [file for file in pickles if not file.name.startswith(_TRAINING_STATE)]
    pickles.sort(key=lambda file: not file.name.startswith("pytorch_model"))  # the others are parts of it
    if pickles and pickled:
        name = pickles[0].name
        return CheckpointError(
            f"{path} has no pytorch_model.bin, and transformers does not read a file named {name}.",
            "If that file holds all weights, rename it to pytorch_model.bin.",
        )
    if pickles:
        return CheckpointError(
            f"{path} has its weights as pickles ({pickles[0].name}), which are read only if you ask for it.",
            "Allow plain tensors in pickles with --pickled-weights, or load and save the model once with "
            "transformers.",
        )
    for pattern, kind in _OTHER_FILES.items():
        if found := sorted(path.glob(pattern)):
            return CheckpointError(
                f"{path} has its weights for another framework: {found[0].name} ({kind}).",
                "Take the checkpoint in the Hugging Face format, with model.safetensors.",
            )
    if found := sorted(path.glob("*.safetensors")):
        return CheckpointError(
            f"{path} has no model.safetensors, and transformers does not read a file named {found[0].name}.",
            "If that file holds all weights, rename it to model.safetensors.",
        )
    return CheckpointError(
        f"{path} has no weights.",
        "Download model.safetensors into it, or allow pickles (.bin) with --pickled-weights.",
    )
