"""Adapters with random weights as peft writes them, and what peft makes of a model with them."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.find import find
from visprune.export.graph import weightless

__all__ = [
    "LINEAR",
    "edit_settings",
    "load",
    "loaded",
    "make",
    "merged",
    "opened",
    "random_config",
    "refused",
    "rename",
]

LINEAR = ("q_proj", "v_proj", "up_proj", "fc1", "linear_2")
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER = ("out_proj", "fc1", "fc2", "patch_embedding")
PROJECTOR = ("linear_1", "linear_2")
TABLES = ("embed_tokens", "lm_head")


def load(path: Path, dtype: str | None = None):
    """The model of a checkpoint in transformers, in float32 or in the dtype that it has on disk."""
    auto = transformers.AutoModelForImageTextToText
    return auto.from_pretrained(path, dtype=dtype or torch.float32).eval()


def make(path: Path, base: Path | torch.nn.Module, seed: int = 0, *, size: float = 0.1, **settings) -> Path:
    """Write an adapter whose every trainable weight is random; `settings` are those of peft's LoraConfig."""
    model = load(base) if isinstance(base, Path) else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator) * size
                    parameter.add_(noise.to(parameter.dtype))
        wrapped.save_pretrained(path)
    return path


def merged(base: Path, *adapters: Path):
    """The model of a checkpoint with adapters merged by peft, one after the other."""
    model = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in adapters:
            model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def random_config(seed: int) -> dict:
    """Settings drawn at random: rank, alpha, patterns, targets in all parts, biases, saved modules."""
    draw = random.Random(seed)
    targets = [*draw.sample(DECODER, 3), *draw.sample(TOWER, 2), draw.choice(PROJECTOR)]
    targets += draw.sample(TABLES, draw.randint(0, 1))
    others = [name for name in (*PROJECTOR, *TABLES) if name not in targets]
    return {
        "r": draw.choice((2, 3, 8)),
        "lora_alpha": draw.choice((1, 4, 16)),
        "target_modules": targets,
        "rank_pattern": {f"layers.1.*{targets[0]}": draw.choice((1, 5)), targets[1]: draw.choice((4, 6))},
        "alpha_pattern": {targets[0]: draw.choice((2, 7)), f"encoder.layers.0..*.{targets[3]}": 3},
        "use_rslora": draw.random() < 0.5,
        "bias": draw.choice(("none", "all", "lora_only")),
        "modules_to_save": draw.sample(others, draw.randint(0, 2)) or None,
        "init_lora_weights": draw.choice((True, False, "gaussian")),
    }


def edit_settings(path: Path, **changes) -> None:
    """Change adapter_config.json; a setting that becomes None is removed."""
    file = path / "adapter_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def rename(path: Path, name) -> None:
    """Give an adapter's tensors other names: `name(old)`."""
    file = path / "adapter_model.safetensors"
    save_file({name(old): tensor for old, tensor in load_file(file).items()}, file, {"format": "pt"})


def opened(model, *given, **options):
    """The checkpoint of a model with adapters, as visprune finds it."""
    return find(model, CheckpointOptions(adapter=[str(one) for one in given], **options))


def loaded(model, *given, **options):
    """The model of a checkpoint with adapters, as visprune loads it."""
    return weightless.load_model(opened(model, *given, **options))


def refused(error, words, model, *given, **options):
    """Assert that adapters of a model are refused with such words, and return the error."""
    with pytest.raises(error, match=words) as caught:
        loaded(model, *given, **options)
    assert caught.value.what.endswith(".")
    return caught.value
