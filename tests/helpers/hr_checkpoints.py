"""Small random LLaVA-HR checkpoints in the form of Hugging Face, with the tensors of the reference."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
from hr_reference import Sizes, random_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from visprune.export import models
from visprune.export.formats.llava_hr import position_grid, tower_name

__all__ = ["config_of", "tower_of", "write"]


def config_of(sizes: Sizes):
    return models.tower("llava_hr_vision_model").LlavaHrVisionConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.image,
        slow_depths=list(sizes.depths),
        slow_hidden_sizes=list(sizes.widths),
        slow_layer_norm_eps=sizes.slow_eps,
        adapters=sizes.adapters,
    )


def state_of(sizes: Sizes, tensors):
    """The tensors of the reference by the names of our tower."""
    own = {tower_name(name, sizes.layers): tensor for name, tensor in tensors.items()}
    own.pop(None)
    place = "embeddings.position_embedding.weight"
    return own | {place: position_grid(own[place], sizes.side)}


def tower_of(sizes: Sizes, tensors):
    """Our tower with the tensors of the reference; every one of its own must be given."""
    tower = models.tower("llava_hr_vision_model").LlavaHrVisionModel(config_of(sizes)).eval()
    tower.load_state_dict(state_of(sizes, tensors))
    return tower


def write(sizes: Sizes, path: Path, **tiny) -> Path:
    """Write a checkpoint; `tiny` are the fields of the decoder in `checkpoints.Tiny`."""
    long = (("max_position_embeddings", 2048),)
    config = checkpoints.config(checkpoints.Tiny(strategy="full", feature_layer=-1, text_extra=long, **tiny))
    config.vision_config = config_of(sizes)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.model.multi_modal_projector.parameters():  # livelier than the default
        parameter.data = torch.randn_like(parameter) * 0.15
    model.model.vision_tower.load_state_dict(state_of(sizes, random_tensors(sizes)))
    model.save_pretrained(path)
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": sizes.image}, crop_size={"height": sizes.image, "width": sizes.image}
        ),
        tokenizer=checkpoints.tokenizer(),
        patch_size=32,
        vision_feature_select_strategy="full",
        chat_template=checkpoints.TEMPLATE,
    )
    processor.save_pretrained(path)
    return path
