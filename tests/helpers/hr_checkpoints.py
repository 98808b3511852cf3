"""Small random LLaVA-HR checkpoints in the original format, and their towers in our form."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import pytest
from hr_reference import Sizes, random_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file

from visprune.export import models
from visprune.export.formats import llava_hr

__all__ = ["PREFIX", "decoder_of", "tower_of", "tower_sizes", "write"]

PREFIX = "model.vision_tower."


def fields(sizes: Sizes):
    """What the configuration of our tower says of these sizes: of the ViT, and of the ConvNeXt."""
    vit = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
    }
    convnext = {
        "slow_depths": list(sizes.depths),
        "slow_hidden_sizes": list(sizes.widths),
        "slow_layer_norm_eps": sizes.slow_eps,
    }
    return vit, convnext


def tower_of(sizes: Sizes, tensors):
    """Our tower with the tensors of the reference; every one of its own must be given."""
    family = models.tower("llava_hr_vision_model")
    vit, convnext = fields(sizes)
    config = family.LlavaHrVisionConfig(**vit, **convnext, image_size=sizes.image, adapters=sizes.adapters)
    own = {llava_hr.tower_name(name, sizes.layers): tensor for name, tensor in tensors.items()}
    own.pop(None)
    place = "embeddings.position_embedding.weight"
    own[place] = llava_hr.position_grid(own[place], sizes.side)
    tower = family.LlavaHrVisionModel(config).eval()
    tower.load_state_dict(own)
    return tower


def tower_sizes(monkeypatch, sizes: Sizes):
    """Let the published names of both towers stand for small ones. A configuration has names only."""
    vit, convnext = fields(sizes)
    monkeypatch.setitem(llava_hr._FAST, "clip-vit-large-patch14-336", vit)
    monkeypatch.setitem(llava_hr._SLOW, "convnext_large", convnext)


def decoder_of(layers=2, hidden=32, heads=4):
    """A small random Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=320,
        max_position_embeddings=2496,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def write(sizes: Sizes, decoder, path: Path) -> Path:
    """Write a checkpoint as LLaVA-HR's own training does: with all weights of both towers inside."""
    path.mkdir(parents=True, exist_ok=True)
    width, rng = decoder.config.hidden_size, torch.Generator().manual_seed(2)
    weights = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    weights |= {PREFIX + name: tensor for name, tensor in random_tensors(sizes).items()}
    for index, inputs in ((0, sizes.hidden), (2, width)):
        weights[f"model.mm_projector.{index}.weight"] = 0.15 * torch.randn(width, inputs, generator=rng)
        weights[f"model.mm_projector.{index}.bias"] = 0.15 * torch.randn(width, generator=rng)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    said = decoder.config.to_dict() | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "freeze_vision": not sizes.adapters,
        "image_aspect_ratio": "pad",
        "input_image_size": sizes.image,
        "is_multipath_encoder": True,
        "mm_hidden_size": sizes.hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "vision_tower_slow": "convnext_large_mlp.clip_laion2b_ft_320",
    }
    (path / "config.json").write_text(json.dumps(said, indent=2))
    checkpoints.tokenizer().save_pretrained(path)
    return path
