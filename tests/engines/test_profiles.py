"""Profiles of the demo model, and of manifests with other numbers. Those of every family are checked by
`rtx_engines.consistent` where their engines are built, in tests/export/test_tensorrt_rtx.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from visprune.budget import LayerBudget
from visprune.errors import BundleError, UnsupportedError, UsageError
from visprune.manifest import LayerPruning
from visprune.runtime.profiles import TOPK_LIMIT, Limits, profiles, resolve
from visprune.tiling import Tiling

NEXT = Tiling(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), 336, 24)
ONEVISION = Tiling(tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7)), 384, 27, 9)


def changed(manifest, *, context=32768, **changes):
    return replace(manifest, decoder=replace(manifest.decoder, context_length=context), **changes)


def tiled(manifest, tiling):
    budget = replace(manifest.pruning.budget, visual_tokens=tiling.side**2)
    pruning = replace(manifest.pruning, budget=budget, keep_tokens=144, grid=(tiling.side, tiling.side))
    return changed(manifest, tiling=tiling, pruning=pruning)


def of(found, graph, name, profile=0):
    ranges = found[graph][profile].inputs[name]
    return ranges.least, ranges.usual, ranges.most


def test_the_demo_model(rtx):
    found = profiles(rtx.manifest, Limits())
    assert of(found, "token_pruner", "keep_tokens") == ((1,), (72,), (144,))
    assert of(found, "embedding", "input_ids") == ((1, 1), (1, 136), (1, 656))
    assert of(found, "embedding", "image_features") == ((0, 192), (72, 192), (144, 192))
    past = "past_key_values.2.value"
    assert of(found, "decoder_model_merged", past) == ((1, 6, 0, 32), (1, 6, 0, 32), (1, 6, 1023, 32))
    assert of(found, "decoder_model_merged", "position_ids", 1) == ((1, 1), (1, 1), (1, 2))
    assert of(found, "decoder_model_merged", past, 1)[1] == (1, 6, 136, 32)


def test_limits_of_the_user(rtx):
    found = profiles(rtx.manifest, Limits(max_images=2, max_prompt=400, max_cache=500))
    assert of(found, "embedding", "input_ids")[2] == (1, 400)
    assert of(found, "embedding", "image_features")[2] == (288, 192)
    assert of(found, "decoder_model_merged", "past_key_values.0.key")[2] == (1, 6, 499, 32)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_prompt": 0}, "max_prompt is 0"),
        ({"max_images": -1}, "max_images is -1"),
        ({"max_prompt": 300, "max_cache": 200}, "300 tokens does not fit into a cache of 200"),
        ({"max_prompt": 1025}, "--max-prompt is 1025, and the model's context holds 1024"),
        ({"max_prompt": 72}, "of 72 tokens cannot hold a picture, of which this bundle keeps 72"),
    ],
)
def test_limits_that_cannot_be(settings, match, rtx):
    with pytest.raises(UsageError, match=match):
        resolve(rtx.manifest, Limits(**settings))


def test_a_prompt_of_tiles(rtx):
    # The whole picture, four tiles, 3 x 24 newlines, 512 tokens of text.
    assert resolve(tiled(rtx.manifest, NEXT), Limits()).max_prompt == 5 * 576 + 72 + 512


def test_more_than_topk_can_choose(rtx):
    manifest = tiled(rtx.manifest, ONEVISION)
    assert resolve(manifest, Limits()).max_prompt == TOPK_LIMIT
    with pytest.raises(UnsupportedError, match="keep_tokens can be 8000, and TensorRT's TopK") as caught:
        resolve(manifest, Limits(max_prompt=8000))
    assert caught.value.hint == "Give --max-prompt 3840 or less."


def test_pruning_inside_chooses_from_the_text_too(rtx):
    inside = LayerPruning("fastv", {}, (0,), "attention", "original", LayerBudget(1, 0.5))
    manifest = changed(rtx.manifest, layer_pruning=inside)
    assert resolve(manifest, Limits(max_images=100)).max_prompt == TOPK_LIMIT
    with pytest.raises(UnsupportedError, match=r"keep_tokens.0 can be 3841"):
        resolve(manifest, Limits(max_prompt=3841))


def test_a_dimension_that_nobody_knows(rtx):
    graph = rtx.manifest.graphs["embedding"]
    first = replace(graph.inputs[0], shape=(1, "X"))
    graphs = rtx.manifest.graphs | {"embedding": replace(graph, inputs=(first, *graph.inputs[1:]))}
    with pytest.raises(BundleError, match="how large X of input_ids in embedding"):
        profiles(replace(rtx.manifest, graphs=graphs), Limits())
