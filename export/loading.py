"""Load what a checkpoint holds: configuration, modules, tokenizer, processor.

The model is loaded twice: once as it is on disk, weights memory-mapped; and once weightless in the
target's dtype and attention flavour, to be traced. This file is the only one that asks transformers
for files.
"""

from __future__ import annotations

import copy
import json
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export import attention, models
from visprune.export.checkpoint import Checkpoint
from visprune.export.parts import Features, cache_shape
from visprune.export.targets import Target
from visprune.manifest import Decoder, Text
from visprune.work import Convention, Shapes

__all__ = [
    "Processor",
    "check_decoder",
    "decoder_facts",
    "load_config",
    "load_model",
    "load_processor",
    "processor_files",
    "quiet",
    "read_processor",
    "shapes",
    "skeleton",
]

# Rotary embeddings whose frequencies depend on the length at run time: no static graph holds them.
_DYNAMIC_ROPE = ("dynamic", "longrope")
_PROCESSOR_HINT = "Put the checkpoint's tokenizer and processor files beside its weights."


@dataclass(frozen=True, slots=True)
class Processor:
    """Text and image processing of a checkpoint, as text to write into a bundle."""

    tokenizer: str
    chat_template: str | None
    image_processor: dict[str, Any]
    text: Text


def quiet() -> None:
    """Transformers' notes on processors and loading are not the user's concern; its errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # It would ask at the terminal whether to run a checkpoint's code, where it was not told.
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def load_config(checkpoint: Checkpoint) -> Any:
    """The configuration, checked for what cannot be exported.

    Raises:
        CheckpointError: It cannot be read.
        UnsupportedError: The decoder's attention or positions cannot be put into a static graph.
    """
    config = _read_config(checkpoint)
    if getattr(config.text_config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedError(
            f"The decoder {config.text_config.model_type!r} caps its attention logits, which no exported "
            "attention does.",
            "Choose a model with another decoder, such as llama, qwen2 or mistral.",
        )
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for entry in nested:
        if entry.get("rope_type") in _DYNAMIC_ROPE:
            raise UnsupportedError(
                f"The decoder's rotary embedding is {entry['rope_type']!r}, which changes with the length.",
                "Choose a model with default, linear, llama3 or yarn positions.",
            )
    return config


def _read_config(checkpoint: Checkpoint) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    except Exception as error:  # a config can fail in as many ways as it has fields
        raise CheckpointError(
            f"The configuration of {checkpoint.path} cannot be read: {_first_line(error)}",
            _hint(error, "Correct config.json."),
        ) from None


def load_model(checkpoint: Checkpoint) -> Any:
    """The model in the dtype it has on disk, in eval mode, weights mapped and not copied.

    Raises:
        CheckpointError: Weights are missing or do not fit the configuration.
    """
    auto = getattr(transformers, models.family(checkpoint.model_type).AUTO_CLASS)
    try:
        model, info = auto.from_pretrained(
            checkpoint.path,
            config=_read_config(checkpoint),
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise CheckpointError(
            f"The weights of {checkpoint.path} cannot be loaded: {_first_line(error)}",
            "Download the checkpoint again.",
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"The weights of {checkpoint.path} lack {len(missing)} tensors, such as {missing[0]}.",
            "Download the checkpoint again.",
        )
    check_decoder(model)
    return model.eval()


def check_decoder(model: Any) -> None:
    """Refuse a decoder whose attention cannot be replaced.

    Raises:
        UnsupportedError: Transformers does not run it through its attention interface.
    """
    if not model.model.language_model._supports_attention_backend:
        raise UnsupportedError(
            f"The decoder {model.config.text_config.model_type!r} lacks transformers' attention interface.",
            "Choose a model with another decoder, such as llama, qwen2 or mistral.",
        )


def skeleton(config: Any, model_type: str, target: Target, dtype: torch.dtype) -> tuple[Any, FakeTensorMode]:
    """The model without weights, in a target's dtype and attention flavour, and the mode it lives in."""
    attention.register()
    auto = getattr(transformers, models.family(model_type).AUTO_CLASS)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # Initialisation would be wasted on fake weights, and some of it looks at values they do not have.
    with fake, no_init_weights():
        model = auto._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention.IMPLEMENTATION[target.flavour]
        )
    return model.eval(), fake


def read_processor(checkpoint: Checkpoint) -> Any:
    """Transformers' own processor.

    Raises:
        CheckpointError: It is missing or broken, or needs code that is not trusted.
    """
    try:
        return transformers.AutoProcessor.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    except Exception as error:
        raise CheckpointError(
            f"The processor of {checkpoint.path} cannot be read: {_first_line(error)}",
            _hint(error, _PROCESSOR_HINT),
        ) from None


def load_processor(checkpoint: Checkpoint, config: Any) -> Processor:
    """Tokenizer, chat template and image processor, as transformers resolves them.

    Raises:
        CheckpointError: One of them is missing or does not fit the model.
    """
    processor = read_processor(checkpoint)
    tokenizer = getattr(processor, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or backend is None:
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.json.", _PROCESSOR_HINT)
    fast = type(backend).from_str(backend.to_str())
    fast.no_truncation()
    fast.no_padding()
    image_token_id = config.image_token_id
    image_token = fast.id_to_token(image_token_id) if isinstance(image_token_id, int) else None
    if image_token is None or fast.encode(image_token, add_special_tokens=False).ids != [image_token_id]:
        raise CheckpointError(
            f"The tokenizer of {checkpoint.path} has no image placeholder with the id {image_token_id}.",
            "Correct image_token_id in config.json, or take the tokenizer that belongs to the model.",
        )
    template = processor.chat_template or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    return Processor(
        tokenizer=fast.to_str(pretty=True),
        chat_template=template,
        image_processor=json.loads(processor.image_processor.to_json_string()),
        text=Text(
            tokenizer="tokenizer.json",
            chat_template="chat_template.jinja" if template else None,
            image_token=image_token,
            image_token_id=image_token_id,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        ),
    )


def decoder_facts(model: Any, dtype: str) -> Decoder:
    """What the manifest says of the LLM."""
    config = model.config.text_config
    kv_heads, head_dim = cache_shape(config)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        window = None
    eos = model.generation_config.eos_token_id
    eos = config.eos_token_id if eos is None else eos
    return Decoder(
        num_layers=config.num_hidden_layers,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        cache_dtype=dtype,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        sliding_window=window,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def shapes(model: Any, features: Features) -> Shapes | None:
    """The sizes that the work of the model depends on; None where no formula counts its decoder's MLPs."""
    vision, text = model.config.vision_config, model.config.text_config
    parts = models.family(model.config.model_type).parts(model)
    layers = getattr(parts.language_model, "layers", ())
    intermediate = getattr(text, "intermediate_size", None)
    if not isinstance(intermediate, int):
        return None
    # Counted by their weights: gate and up projections may be one matrix, and experts fit no convention.
    weights = {
        sum(linear.weight.numel() for linear in _linears(getattr(layer, "mlp", None))) for layer in layers
    }
    matrix = text.hidden_size * intermediate
    conventions: dict[int, Convention] = {2 * matrix: "F2", 3 * matrix: "F3"}
    convention = conventions.get(weights.pop()) if len(weights) == 1 else None
    if convention is None:
        return None
    patches = features.side * features.side
    return Shapes(
        vision_hidden_size=vision.hidden_size,
        vision_intermediate_size=vision.intermediate_size,
        vision_layers=max(features.layer_counts),
        vision_tokens=features.prefix_tokens + patches,
        vision_patches=patches,
        patch_values=features.channels * vision.patch_size**2,
        projector=tuple((linear.in_features, linear.out_features) for linear in _linears(parts.projector)),
        hidden_size=text.hidden_size,
        intermediate_size=intermediate,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        convention=convention,
    )


def _linears(module: nn.Module | None) -> list[nn.Linear]:
    """The linear layers of a module, in the order it defines them."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)] if module is not None else []


def _first_line(error: Exception) -> str:
    """What a library says, cut where it begins to list everything it knows."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" ...")


def _hint(error: Exception, otherwise: str) -> str:
    """What to do about a file that transformers cannot read."""
    if "trust_remote_code" in str(error):
        return "Read that code, and let it run with --trust-remote-code if you trust it."
    return otherwise


def processor_files(processor: Processor) -> dict[str, str]:
    """The files that `processor.text` and the manifest name, with their text."""
    files = {
        processor.text.tokenizer: processor.tokenizer,
        "preprocessor_config.json": json.dumps(processor.image_processor, indent=2) + "\n",
    }
    if processor.text.chat_template is not None and processor.chat_template is not None:
        files[processor.text.chat_template] = processor.chat_template
    return files
