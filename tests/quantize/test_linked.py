"""Bundles whose files are links or have several hard links are read like others."""

from __future__ import annotations

import shutil

import onnx
import pytest
from linked import WAYS

from visprune.bundle import Bundle
from visprune.errors import BundleError
from visprune.quantize import quantize
from visprune.quantize.bundle_graphs import load_graph
from visprune.runtime import load


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_made_is_what_a_plain_copy_makes(demo, demo_in, way, tmp_path):
    linked = Bundle.open(way(demo.path, tmp_path))
    made = quantize(linked, tmp_path / "made", precision="int8", samples=8, timing=False)
    plain = demo_in("int8")
    hashes = [{n: r for n, r in one.manifest.files.items() if n.startswith("onnx/")} for one in (made, plain)]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 8
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in made.path.rglob("*.onnx*"))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_they_run(demo, way, low_memory, tmp_path, picture):
    answers = []
    for folder in (demo.path, way(demo.path, tmp_path)):
        with load(folder, low_memory=low_memory) as pipeline:
            answers.append(pipeline.generate(picture(1), "What is it?", max_new_tokens=4).token_ids)
    assert answers[0] == answers[1]


def test_weights_in_a_file_that_the_manifest_does_not_name(demo, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(demo.path, folder)
    path = folder / "onnx" / "embedding.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "vision_encoder.onnx_data" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"in 'onnx/vision_encoder.onnx_data', which the manifest does not"):
        load_graph(Bundle(folder, demo.manifest), "embedding")


def test_something_that_is_no_graph(demo, tmp_path):
    shutil.copytree(demo.path, tmp_path / "copy")
    (tmp_path / "copy" / "onnx" / "embedding.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"onnx/embedding\.onnx is no ONNX graph"):
        load_graph(Bundle(tmp_path / "copy", demo.manifest), "embedding")
