"""Profiles of the demo model, and of manifests with other numbers.

The profiles of every model family are checked by `rtx_engines.consistent` where their engines are built, in
tests/export/graph/test_tensorrt_rtx.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from visprune.budget import LayerBudget
from visprune.errors import BundleError, UnsupportedError, UsageError
from visprune.manifest import Graph, LayerPruning, Stage, TensorSpec
from visprune.runtime.backends.profiles import (
    TOPK_LIMIT,
    Limits,
    _picture_bounds,
    capacities,
    profiles,
    resolve_limits,
)
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
        ({"max_images": None}, "max_images is None"),
        ({"max_cache": 400.0}, "max_cache is 400.0"),
        ({"max_prompt": 300, "max_cache": 200}, "300 tokens does not fit into a cache of 200"),
        ({"max_prompt": 1025}, "--max-prompt is 1025, and the model's context holds 1024"),
        ({"max_prompt": 72}, "of 72 tokens cannot hold a picture, of which this bundle keeps 72"),
    ],
)
def test_limits_that_cannot_be(settings, match, rtx):
    with pytest.raises(UsageError, match=match):
        resolve_limits(rtx.manifest, Limits(**settings))


def test_a_prompt_of_tiles(rtx):
    # The whole picture, four tiles, 3 x 24 newlines, 512 tokens of text.
    assert resolve_limits(tiled(rtx.manifest, NEXT), Limits()).max_prompt == 5 * 576 + 72 + 512


def test_frames_of_a_video(rtx):
    """As many as have no more tokens than the largest picture, each token of 2 x 2 patches."""
    picture, video = (
        _picture_bounds(tiled(rtx.manifest, tiling)) for tiling in (NEXT, replace(NEXT, frame_pooling=2))
    )
    assert (picture.tiles, video.tiles) == ((1, 5, 5), (1, 5, 20))  # 2,880 tokens, 144 of a frame
    assert video.mixed == (1, 1, 4)
    assert _picture_bounds(tiled(rtx.manifest, replace(NEXT, frame_pooling=3))).mixed == (1, 1, 9)
    assert video.tokens == picture.tokens


def test_more_than_topk_can_choose(rtx):
    manifest = tiled(rtx.manifest, ONEVISION)
    assert resolve_limits(manifest, Limits()).max_prompt == TOPK_LIMIT
    with pytest.raises(UnsupportedError, match="keep_tokens can be 8000, and TensorRT's TopK") as caught:
        resolve_limits(manifest, Limits(max_prompt=8000))
    assert caught.value.hint == "Give --max-prompt 3840 or less."


def test_pruning_inside_chooses_from_the_text_too(rtx):
    inside = LayerPruning("fastv", {}, (0,), "attention", "original", LayerBudget(1, 0.5))
    manifest = changed(rtx.manifest, layer_pruning=inside)
    assert resolve_limits(manifest, Limits(max_images=100)).max_prompt == TOPK_LIMIT
    with pytest.raises(UnsupportedError, match=r"keep_tokens.0 can be 3841"):
        resolve_limits(manifest, Limits(max_prompt=3841))


def test_a_dimension_that_nobody_knows(rtx):
    graph = rtx.manifest.graphs["embedding"]
    first = replace(graph.inputs[0], shape=(1, "X"))
    graphs = rtx.manifest.graphs | {"embedding": replace(graph, inputs=(first, *graph.inputs[1:]))}
    with pytest.raises(BundleError, match="how large X of input_ids in embedding"):
        profiles(replace(rtx.manifest, graphs=graphs), Limits())


def pruned_inside(manifest, layers, **budget):
    """The demo's manifest, changed to prune inside the LLM, with a graph for each segment."""
    inside = LayerPruning("fastv", {}, layers, "attention", "original", LayerBudget(len(layers), **budget))
    *before, last = manifest.stages
    whole = manifest.graphs[last.graph]
    pruner = TensorSpec("keep_tokens", "int64", ())
    graphs, stages = dict(manifest.graphs), list(before)
    del graphs[last.graph]
    for k in range(len(layers) + 1):
        name = f"decoder_segment_{k}"
        graphs[name] = whole
        stages.append(replace(last, graph=name))
        if k < len(layers):
            graphs["segment_pruner"] = Graph("pruner.onnx", None, (pruner,), ())
            stages.append(Stage("segment_pruner", "visual", {"keep_tokens": f"keep_tokens.{k}"}, {}))
    return changed(manifest, layer_pruning=inside, graphs=graphs, stages=tuple(stages))


def test_a_cache_in_place_has_no_range(rtx):
    decoder = "decoder_model_merged"
    assert capacities(rtx.manifest, Limits()) == {decoder: 1024}
    assert capacities(rtx.manifest, Limits(max_prompt=300, max_cache=501)) == {decoder: 504}
    found, plain = profiles(rtx.manifest, Limits(), in_place=True), profiles(rtx.manifest, Limits())
    assert {name: made for name, made in found.items() if name != decoder} == {
        name: made for name, made in plain.items() if name != decoder
    }
    prefill, decode = found[decoder]
    assert [prefill.name, decode.name] == ["prefill", "decode"]
    assert prefill.inputs.keys() == decode.inputs.keys() == {"inputs_embeds", "position_ids"}
    assert of(found, decoder, "position_ids", 0) == ((1, 1), (1, 136), (1, 656))
    assert of(found, decoder, "position_ids", 1) == ((1, 1), (1, 1), (1, 2))


def test_later_caches_are_shorter(rtx):
    """An image of the demo enters the LLM as 72 tokens."""
    once = pruned_inside(rtx.manifest, (1,), ratio=0.5, rounding="nearest")
    assert capacities(once, Limits(max_prompt=656, max_cache=1024)) == {
        "decoder_segment_0": 1024,
        "decoder_segment_1": 1024 - 32,  # 36 are gone, and a multiple of 8
    }
    thrice = capacities(once, Limits(max_images=3, max_prompt=656, max_cache=1024))
    assert thrice["decoder_segment_1"] == 1024 - 104  # 3 x 36
    twice = pruned_inside(rtx.manifest, (0, 1), ratio=0.25)
    assert list(capacities(twice, Limits(max_prompt=656, max_cache=1024)).values()) == [1024, 992, 976]
    recipe = pruned_inside(rtx.manifest, (0, 1), ratio=0.7, deletions=(8, 16), recipe_tokens=36)
    assert list(capacities(recipe, Limits(max_prompt=656, max_cache=1024)).values()) == [1024, 1008, 976]


def test_more_pictures_than_fit_leave_room_for_those_that_do(rtx):
    """Two images of 72 tokens fit into 200, with 56 tokens of text. 1 of their tokens remains later."""
    manifest = pruned_inside(rtx.manifest, (1,), ratio=0.01)
    limits = Limits(max_images=50, max_prompt=200, max_cache=200)
    assert capacities(manifest, limits)["decoder_segment_1"] == 200 - 2 * 72 + 1 + 7
    found = profiles(manifest, limits, in_place=True)
    assert of(found, "decoder_segment_0", "position_ids")[2] == (1, 200)
    assert of(found, "decoder_segment_1", "position_ids") == ((1, 1), (1, 64), (1, 64))
