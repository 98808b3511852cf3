"""The sizes of a model that go into its manifest, read off tiny models of several forms."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from visprune.export import models
from visprune.export.checkpoint import loading
from visprune.export.graph import weightless
from visprune.work import Shapes


@pytest.fixture
def shapes(checkpoint):
    from visprune.export.checkpoint.find import find

    def read(**changes):
        found = find(checkpoint(checkpoint.Tiny(**changes)))
        config = loading.load_config(found)
        return loading.shapes(weightless.load_model(found), models.family("llava").features(config))

    return read


EXPECTED = Shapes(32, 48, 2, 17, 16, 3 * 14 * 14, ((32, 32), (32, 32)), 32, 64, 2, 320, "F3")


@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral", "Phi3Config"])
def test_a_gated_decoder(shapes, text):
    assert shapes(text=text) == EXPECTED  # Phi-3 has gate and up projections in one matrix


def test_a_tower_without_a_cls_and_several_feature_layers(shapes):
    found = shapes(tower="siglip", strategy="full", feature_layer=(-3, -1))
    assert (found.vision_tokens, found.vision_patches, found.vision_layers) == (16, 16, 3)
    assert found.projector == ((64, 32), (32, 32))


def test_a_decoder_with_two_matrices(shapes):
    assert shapes(text="Starcoder2Config").convention == "F2"


def test_experts_are_not_known(shapes):
    extra = (("moe_intermediate_size", 16), ("num_experts", 4), ("num_experts_per_tok", 2))
    assert shapes(text="Qwen3MoeConfig", text_extra=extra) is None
