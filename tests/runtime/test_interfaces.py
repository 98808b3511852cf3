"""Manifests whose graphs fit neither each other nor what is said of the model."""

from __future__ import annotations

import json

import pytest

from visprune.errors import BundleError
from visprune.manifest import MANIFEST
from visprune.runtime import load


@pytest.fixture
def refused(tiny_copy):
    """Change a manifest as JSON, and expect it to be refused before a graph is loaded."""

    def check(change, match):
        data = json.loads((tiny_copy / MANIFEST).read_text())
        change(data)
        (tiny_copy / MANIFEST).write_text(json.dumps(data))
        with pytest.raises(BundleError, match=match) as caught:
            load(tiny_copy, verify=False)
        assert caught.value.hint

    return check


def tensor(data, graph, kind, name):
    return next(spec for spec in data["graphs"][graph][kind] if spec["name"] == name)


@pytest.mark.parametrize(
    ("graph", "kind", "name", "change", "match"),
    [
        (
            "decoder_model_merged",
            "outputs",
            "logits",
            {"shape": [1, 1, 7]},
            "7 numbers for a vocabulary of 259",
        ),
        ("decoder_model_merged", "outputs", "logits", {"shape": [1, 259]}, r"'logits' .* float32 \[1, 259\]"),
        ("decoder_model_merged", "outputs", "logits", {"dtype": "int64"}, "'logits' .* is int64"),
        ("decoder_model_merged", "inputs", "position_ids", {"dtype": "int32"}, "'position_ids' .* is int32"),
        ("embedding", "inputs", "input_ids", {"shape": [2, "S"]}, r"'input_ids' .* int64 \[2, 'S'\]"),
        ("embedding", "inputs", "image_features", {"shape": ["M", 9]}, r"reads 'image_features' as .*'M', 9"),
        ("embedding", "inputs", "image_features", {"dtype": "float16"}, "reads 'image_features' as float16"),
        ("embedding", "inputs", "image_features", {"shape": [8]}, "reads 'image_features' as"),
        ("token_pruner", "inputs", "keep_tokens", {"shape": [1]}, r"'keep_tokens' .* int64 \[1\]"),
        ("token_pruner", "outputs", "keep_indices", {"dtype": "float32"}, "'keep_indices' .* is float32"),
        ("vision_encoder", "inputs", "pixel_values", {"shape": ["T", 4, 56, 56]}, "'pixel_values' of the"),
        (
            "decoder_model_merged",
            "outputs",
            "present.0.key",
            {"shape": [1, 3, "P + S", 4]},
            "'present.0.key' is",
        ),
    ],
)
def test_tensors(refused, graph, kind, name, change, match):
    refused(lambda data: tensor(data, graph, kind, name).update(change), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vocab_size": 300}, "259 numbers for a vocabulary of 300"),
        ({"num_layers": 3}, "do not cache the 3 layers"),
        ({"num_kv_heads": 4}, "decoder has float32 .1, 4, P, 4"),
    ],
)
def test_the_decoder(refused, change, match):
    refused(lambda data: data["decoder"].update(change), match)


def test_a_picture_of_another_size(refused, tiny_copy):
    path = tiny_copy / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config["crop_size"] = {"height": 70, "width": 56}
    path.write_text(json.dumps(config))
    size = path.stat().st_size
    refused(
        lambda data: data["files"]["preprocessor_config.json"].update(size=size),
        r"makes pictures of 70 x 56 pixels, and the graphs take \['T', 3, 56, 56\]",
    )


def test_tiles_of_another_size(refused):
    tiling = {"pinpoints": [[28, 28]], "tile_size": 28, "side": 4}
    refused(lambda data: data.update(tiling=tiling), "makes tiles of 56 x 56 pixels, and .* tiles of 28")
