"""LLaVA-HR's tower agrees with a reference of timm and plain PyTorch, which has the original names."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

from hr_checkpoints import PREFIX, tower_of
from hr_reference import FAST, SLOW, Sizes, random_tensors, see

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export import models
from visprune.export.files.stored import ComputedTensor, StoredTensor
from visprune.export.formats.llava_hr import tensors, tower_name, vision_config

CASES = {
    "768": Sizes(layers=24),
    "1024": Sizes(image=1024, layers=8),
    "1024, another epsilon": Sizes(image=1024, layers=4, slow_eps=0.3),
    "frozen in training": Sizes(layers=4, adapters=False),
}
ORIGINAL = {
    "is_multipath_encoder": True,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "vision_tower_slow": "convnext_large_mlp.clip_laion2b_ft_320",
    "input_image_size": 1024,
    "mm_vision_select_layer": -2,
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case):
    sizes = CASES[case]
    weights = random_tensors(sizes)
    count = 2 if sizes.layers == 4 else 1
    pixels = torch.randn(count, 3, sizes.image, sizes.image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, _ = see(sizes, weights, pixels)
        got = tower_of(sizes, weights)(pixels).last_hidden_state
    assert want.shape == (count, sizes.side**2, sizes.hidden)
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_every_tensor_of_the_reference_matters():
    """Otherwise a name that is mapped to a wrong place would go unseen."""
    sizes = Sizes(image=96, layers=4, trained=4)  # the reference has no smallest size
    weights = {name: tensor.requires_grad_() for name, tensor in random_tensors(sizes).items()}
    pixels = torch.randn(1, 3, sizes.image, sizes.image, generator=torch.Generator().manual_seed(1))
    see(sizes, weights, pixels)[0].square().sum().backward()
    felt = {
        name for name, tensor in weights.items() if tensor.grad is not None and tensor.grad.abs().max() > 1e-3
    }
    without = ("class_embedding", "post_layernorm", ".head.", "k_proj.bias")  # softmax cancels the last
    assert felt == {name for name in weights if not any(part in name for part in without)}


@pytest.mark.parametrize(
    ("slow", "known"),
    [
        ("convnext_large_mlp.clip_laion2b_ft_320", "convnext_large_mlp"),
        ("./checkpoints/convnext_xxlarge.clip_laion2b_soup", "convnext_xxlarge"),
    ],
)
def test_published_sizes(slow, known):
    """Those of the ConvNeXt are timm's, and those of the ViT are transformers' defaults for LLaVA 1.5."""
    fields = vision_config(ORIGINAL | {"vision_tower_slow": slow})
    family = models.tower(fields.pop("model_type"))
    config = family.LlavaHrVisionConfig(**fields)
    with torch.device("meta"):
        tower, convnext = family.LlavaHrVisionModel(config), timm.create_model(known)
    own = {name: tensor.shape for name, tensor in tower.state_dict().items() if name.startswith("slow_tower")}
    theirs = {
        tower_name(SLOW + name.replace("gamma", "weight"), 24): tensor.shape
        for name, tensor in convnext.state_dict().items()
    }
    del theirs[None]  # the head
    assert own == theirs
    norms = (module for module in tower.slow_tower.modules() if isinstance(module, torch.nn.LayerNorm))
    theirs = {m.eps for m in convnext.stages.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {module.eps for module in norms} == theirs | {convnext.stem[1].eps}
    clip = transformers.LlavaConfig().vision_config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*same, "hidden_act", "layer_norm_eps"):
        assert getattr(config, name) == getattr(clip, name), name
    assert config.fast_patch_size == clip.patch_size
    assert (config.image_size, config.patch_size, config.adapters) == (1024, 32, True)


def test_a_tower_that_was_frozen_has_no_adapters():
    assert vision_config(ORIGINAL | {"freeze_vision": True})["adapters"] is False


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"input_image_size": 384}, UnsupportedError, "384 x 384 pixels.*at least 768"),
        ({"input_image_size": 1000}, UnsupportedError, "1000 x 1000 pixels.*steps of 32"),
        ({"input_image_size": None}, CheckpointError, "input_image_size.*None"),
        (
            {"vision_tower_slow": "convnext_base.clip_laiona"},
            UnsupportedError,
            "vision_tower_slow 'convnext_base.clip_laiona'.*convnext_large, convnext_xxlarge",
        ),
        (
            {"mm_vision_tower": "google/siglip-so400m-patch14-384"},
            UnsupportedError,
            "mm_vision_tower 'google/siglip.*clip-vit-large-patch14-336",
        ),
        ({"vision_tower_slow": None}, UnsupportedError, "vision_tower_slow None"),
        ({"image_aspect_ratio": "anyres"}, UnsupportedError, "image_aspect_ratio = 'anyres'.*pad and square"),
    ],
)
def test_refused(change, error, match):
    with pytest.raises(error) as caught:
        vision_config(ORIGINAL | change)
    assert caught.match(f"(?s){match}")


@pytest.mark.parametrize("shape", [(1, 32), (25, 32, 1), (27, 32)])
def test_positions_that_are_no_square_and_a_class_token(shape):
    name = PREFIX + FAST + "embeddings.position_embedding.weight"
    stored = {name: StoredTensor(name, Path("model.safetensors"), 0, 0, "F32", shape)}
    with pytest.raises(
        CheckpointError, match=f"position_embedding.weight is .{', '.join(map(str, shape))}.,"
    ):
        tensors(stored, vision_config(ORIGINAL))


def test_tensors():
    """The head of the ConvNeXt, the class token and the last norm are left out; other names stay."""
    sizes = Sizes(layers=4)
    names = [PREFIX + name for name in random_tensors(sizes)] + ["lm_head.weight"]
    shape = (sizes.trained**2 + 1, sizes.hidden)
    stored = {name: StoredTensor(name, Path("model.safetensors"), 0, 0, "F16", shape) for name in names}
    found = tensors(stored, vision_config(ORIGINAL) | {"num_hidden_layers": 4})
    made = tower_of(sizes, random_tensors(sizes)).state_dict()
    assert found.keys() == {f"vision_tower.{name}" for name in made} | {"lm_head.weight"}
    positions = found["vision_tower.embeddings.position_embedding.weight"]
    assert isinstance(positions, ComputedTensor)
    assert (positions.shape, positions.dtype) == ((32 * 32, 32), "F16")
