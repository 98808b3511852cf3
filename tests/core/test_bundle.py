"""Manifests of damaged copies, old tools and attackers are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from linked import in_hub_cache

from visprune.budget import Budget, LayerBudget
from visprune.bundle import Bundle
from visprune.errors import BundleError, UsageError
from visprune.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Decoder,
    FileRecord,
    Graph,
    LayerPruning,
    Manifest,
    Parity,
    ParityRow,
    Pruning,
    Source,
    Stage,
    TensorSpec,
    Text,
)
from visprune.records import sha256

Edit = Callable[[dict[str, Any]], None]

FILES = (
    "a.onnx",
    "a.onnx_data",
    "b.onnx",
    "chat_template.jinja",
    "preprocessor_config.json",
    "tokenizer.json",
)


def manifest_of(folder: Path) -> Manifest:
    """Return two graphs; the second reads a value that the first assigns."""
    pixels = TensorSpec("pixel_values", "float32", ("T", 3, 8, 8))
    features = TensorSpec("image_features", "float32", ("M", 4))
    logits = TensorSpec("logits", "float32", (1, 1, 10))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        source=Source("m", "llava", "clip_vision_model", "llama", 10, "float32", "0" * 64, {}, "2026-11-21"),
        target="onnxruntime",
        flavour="native",
        dtype="float32",
        opset=23,
        graphs={
            "a": Graph("a.onnx", "a.onnx_data", (pixels,), (features,)),
            "b": Graph("b.onnx", None, (features,), (logits,)),
        },
        stages=(
            Stage("a", "image", {"pixel_values": "pixel_values"}, {"image_features": "image_features"}),
            Stage("b", "always", {"image_features": "image_features"}, {"logits": "logits"}),
        ),
        pruning=Pruning("uniform", {}, 4, Budget(16), (4, 4), 0, 0, "contiguous"),
        decoder=Decoder(1, 1, 4, "float32", 10, 64, None, (1,)),
        text=Text("tokenizer.json", "chat_template.jinja", "<image>", 2, "<s>", "</s>"),
        image_processor="preprocessor_config.json",
        parity=Parity(True, (ParityRow("logits", 1e-6, 5e-4, True, ""),)),
        files={name: FileRecord((folder / name).stat().st_size, sha256(folder / name)) for name in FILES},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a complete bundle."""
    root = tmp_path / "bundle"
    root.mkdir()
    for name in FILES:
        (root / name).write_text(f"the content of {name}")
    (root / MANIFEST).write_text(manifest_of(root).to_json())
    return root


@pytest.fixture
def edit(folder: Path) -> Callable[[Edit], Path]:
    """Change the manifest as JSON."""

    def apply(change: Edit) -> Path:
        data = json.loads((folder / MANIFEST).read_text())
        change(data)
        (folder / MANIFEST).write_text(json.dumps(data))
        return folder

    return apply


def test_what_is_written_is_read(folder):
    bundle = Bundle.open(folder)
    assert bundle.manifest == manifest_of(folder)
    assert Bundle.open(str(folder)) == bundle
    bundle.verify()


def test_every_record_of_the_manifest_is_frozen():
    records = (
        Manifest,
        Source,
        Graph,
        Stage,
        Pruning,
        LayerPruning,
        Decoder,
        Text,
        Parity,
        ParityRow,
        FileRecord,
        TensorSpec,
    )
    assert all(record.__dataclass_params__.frozen for record in records)


def test_extra_files_in_the_folder_do_not_matter(folder):
    (folder / "notes.txt").write_text("mine")
    Bundle.open(folder).verify()


def test_the_folder_may_be_reached_through_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(tmp_path / "link").verify()


def test_a_file_may_be_a_link_within_the_bundle(folder):
    (folder / "b.onnx").rename(folder / "real.onnx")
    (folder / "b.onnx").symlink_to("real.onnx")
    Bundle.open(folder).verify()


# --- no bundle ---


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_something_that_is_no_bundle_is_refused(tmp_path, make):
    make(tmp_path / "thing")
    with pytest.raises(BundleError, match="is not a bundle") as caught:
        Bundle.open(tmp_path / "thing")
    assert "visprune export" in caught.value.hint


def test_a_path_that_the_system_refuses_is_refused(tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b"\xff\xfe\x00", b"[" * 200_000, b'{"schema_version": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut", "words", "bytes", "deep", "digits"],
)
def test_a_manifest_that_is_no_json_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=f"{MANIFEST} cannot be read"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "content", ["[]", "null", '"x"', "{}", '{"schema_version": "1"}', '{"schema_version": true}']
)
def test_a_manifest_without_a_version_is_refused(folder, content):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match="has no schema version"):
        Bundle.open(folder)


@pytest.mark.parametrize("version", [0, -1, 1.0, None])
def test_a_version_that_never_was_is_refused(edit, version):
    with pytest.raises(BundleError, match="has no schema version"):
        Bundle.open(edit(lambda data: data.update(schema_version=version)))


def test_a_newer_schema_is_refused_before_its_fields_are_read(edit):
    def change(data):
        data.clear()
        data.update(schema_version=SCHEMA_VERSION + 1, fields_of_the_future=True)

    with pytest.raises(
        BundleError, match=f"has schema {SCHEMA_VERSION + 1}, and this visprune reads up to"
    ) as caught:
        Bundle.open(edit(change))
    assert "pip install -U visprune" in caught.value.hint


# --- fields ---


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: d.update(colour="red"), "unknown field 'colour'"),
        (lambda d: d["graphs"]["a"].update(colour="red"), r"graphs\.a has an unknown field"),
        (lambda d: d.pop("decoder"), "has no 'decoder'"),
        (lambda d: d["decoder"].pop("head_dim"), "decoder has no 'head_dim'"),
        (lambda d: d["decoder"].update(num_layers=True), r"decoder\.num_layers should be int, and is bool"),
        (lambda d: d["decoder"].update(num_layers=1.0), r"decoder\.num_layers should be int"),
        (lambda d: d["decoder"].update(eos_token_ids=1), "eos_token_ids should be"),
        (lambda d: d.update(flavour="spicy"), "flavour should be"),
        (lambda d: d["stages"][0].update(when="sometimes"), r"stages\[0\]\.when should be"),
        (lambda d: d["pruning"].update(positions="shuffled"), r"pruning\.positions should be"),
        (lambda d: d["pruning"].update(grid=[4]), r"pruning\.grid should be"),
        (lambda d: d["pruning"]["budget"].update(unit_tokens=0), r"pruning\.budget cannot be used"),
        (lambda d: d["pruning"]["budget"].update(visual_tokens=-16), r"pruning\.budget cannot be used"),
        (lambda d: d["pruning"].update(keep_tokens=17), "Cannot keep 17 of 16"),
        (lambda d: d["pruning"].update(keep_tokens=0), "Cannot keep 0 of 16"),
        (lambda d: d["pruning"]["budget"].update(prunable=False), "keeps all 16"),
        (lambda d: d["pruning"].update(grid=[4, 5]), r"not the rest of a grid of 4 x 5"),
        (lambda d: d["pruning"].update(grid=[-4, -4]), "not the rest of a grid"),
        (lambda d: d["pruning"].update(grid_offset=1), "from patch 1 on"),
        (lambda d: d["pruning"].update(grid_offset=-1), "from patch -1 on"),
        (lambda d: d["pruning"].update(always_kept=-1), "always keeps -1"),
        (
            lambda d: d["decoder"].update(cache_dtype="floaty"),
            r"decoder cannot be used: cache_dtype is 'floaty'",
        ),
        (lambda d: d["decoder"].update(num_kv_heads=-1), "num_kv_heads is -1"),
        (lambda d: d["decoder"].update(num_layers=0), "num_layers is 0"),
        (lambda d: d["decoder"].update(head_dim=0), "head_dim is 0"),
        (lambda d: d["decoder"].update(context_length=0), "context_length is 0"),
        (lambda d: d["decoder"].update(sliding_window=-4), "sliding_window is -4"),
    ],
)
def test_a_field_that_cannot_be_is_refused(edit, change, what):
    with pytest.raises(BundleError, match=what):
        Bundle.open(edit(change))


def test_a_grid_may_begin_before_the_first_visual_token(edit):
    assert Bundle.open(edit(lambda d: d["pruning"].update(grid=[1, 17], grid_offset=1)))


# --- the program ---


def test_a_stage_of_an_unknown_graph_is_refused(edit):
    with pytest.raises(BundleError, match="unknown graph 'c'"):
        Bundle.open(edit(lambda d: d["stages"][0].update(graph="c")))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["stages"][0]["inputs"].clear(),
        lambda d: d["stages"][0]["inputs"].update(extra="input_ids"),
        lambda d: d["stages"][0]["outputs"].update(extra="other"),
    ],
)
def test_a_stage_that_does_not_fit_its_graph_is_refused(edit, change):
    with pytest.raises(BundleError, match="does not fit its graph's tensors"):
        Bundle.open(edit(change))


def test_an_output_that_nobody_wants_may_be_left_out(edit):
    Bundle.open(edit(lambda d: d["stages"][1]["outputs"].clear()))


def test_a_value_assigned_by_two_stages_is_refused(edit):
    with pytest.raises(BundleError, match="assigns 'image_features' twice"):
        Bundle.open(edit(lambda d: d["stages"][1]["outputs"].update(logits="image_features")))


def test_a_value_assigned_twice_by_one_stage_is_refused(edit):
    def change(data):
        data["graphs"]["b"]["outputs"].append({"name": "more", "dtype": "float32", "shape": [1]})
        data["stages"][1]["outputs"]["more"] = "logits"

    with pytest.raises(BundleError, match="assigns 'logits' twice"):
        Bundle.open(edit(change))


@pytest.mark.parametrize(
    "name", ["input_ids", "pixel_values", "keep_tokens", "position_ids", "past_key_values.0.key"]
)
def test_a_value_that_the_runtime_supplies_cannot_be_assigned(edit, name):
    with pytest.raises(BundleError, match=f"assigns '{name}' twice"):
        Bundle.open(edit(lambda d: d["stages"][1]["outputs"].update(logits=name)))


# --- pruning inside the LLM ---


def inside(layers=(0, 2), positions="original", **budget: Any) -> LayerPruning:
    return LayerPruning(
        "m", {}, tuple(layers), "attention", positions, LayerBudget(**({"points": 2, "ratio": 0.5} | budget))
    )


@pytest.fixture
def pruned(folder: Path) -> Callable[[Edit], Path]:
    """Change the manifest of a bundle whose decoder has four layers and two prune points."""
    manifest = manifest_of(folder)
    stage = replace(manifest.stages[0], bypass={"image_features": "pixel_values"})
    manifest = replace(
        manifest,
        decoder=replace(manifest.decoder, num_layers=4),
        layer_pruning=inside(),
        stages=(stage, *manifest.stages[1:]),
    )

    def apply(change: Edit) -> Path:
        data = json.loads(manifest.to_json())
        change(data)
        (folder / MANIFEST).write_text(json.dumps(data))
        return folder

    return apply


def test_pruning_inside_the_llm_is_read_as_it_is_written(pruned):
    manifest = Bundle.open(pruned(lambda d: None)).manifest
    assert manifest.layer_pruning == inside()
    assert manifest.stages[0].bypass == {"image_features": "pixel_values"}


def test_a_manifest_of_the_first_schema_is_still_read(edit):
    def change(data):
        data["schema_version"] = 1
        del data["layer_pruning"], data["shapes"]
        for stage in data["stages"]:
            del stage["bypass"]

        data["stages"][0]["when"] = "visual"

    manifest = Bundle.open(edit(change)).manifest
    assert (manifest.layer_pruning, manifest.shapes, manifest.stages[0].bypass) == (None, None, {})
    assert manifest.stages[0].when == "image"  # what saw all new images at once sees one at a time


@pytest.mark.parametrize(
    "bypass",
    [
        {"logits": "pixel_values"},  # of another stage
        {"image_features": "input_ids"},  # nothing that it reads
        {"pixel_values": "image_features"},
        {"nothing": "pixel_values"},
    ],
)
def test_a_bypass_of_values_that_are_not_the_stages_own_is_refused(pruned, bypass):
    with pytest.raises(BundleError, match="stage 'a' is bypassed by values that are not its own"):
        Bundle.open(pruned(lambda d: d["stages"][0].update(bypass=bypass)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: p.update(layers=[0, 3]), "prunes after layer 3 of 4, where nothing follows"),
        (lambda p: p.update(layers=[0, 10**12]), "where nothing follows"),
        (lambda p: p.update(layers=[2, 0]), r"prune layers \(2, 0\) do not fit"),
        (lambda p: p.update(layers=[1, 1]), r"prune layers \(1, 1\) do not fit"),
        (lambda p: p.update(layers=[-1, 1]), r"prune layers \(-1, 1\) do not fit"),
        (lambda p: p.update(layers=[0]), r"prune layers \(0,\) do not fit 2"),
        (lambda p: p.update(layers=[]), "do not fit 2 prune points"),
        (lambda p: p.update(layers=[0, True]), r"layers\[1\] should be int"),
        (lambda p: p.update(boundary="mlp"), r"layer_pruning\.boundary should be"),
        (lambda p: p.update(positions="contiguous"), r"layer_pruning\.positions should be"),
        (lambda p: p.update(colour="red"), "layer_pruning has an unknown field 'colour'"),
        (lambda p: p["budget"].update(ratio=0), r"layer_pruning\.budget cannot be used: The ratio 0"),
        (lambda p: p["budget"].update(points=0), "budget cannot be used: There is no layer"),
        (lambda p: p["budget"].update(scope="image"), r"budget\.scope should be"),
        (lambda p: p["budget"].update(recipe_tokens=9), "0 deletions do not fit 2"),
        (lambda p: p["budget"].update(recipe_tokens=9, deletions=[4, 5]), "deletes 9 of 9"),
    ],
)
def test_pruning_inside_the_llm_that_cannot_be_is_refused(pruned, change, what):
    with pytest.raises(BundleError, match=what):
        Bundle.open(pruned(lambda d: change(d["layer_pruning"])))


@pytest.mark.parametrize("name", ["keep_tokens.0", "keep_tokens.1", "position_ids.1", "position_ids.2"])
def test_what_the_runtime_supplies_at_prune_points_cannot_be_assigned(pruned, name):
    def change(data):
        data["stages"][1]["outputs"]["logits"] = name
        data["layer_pruning"]["positions"] = "renumbered"

    with pytest.raises(BundleError, match=f"assigns '{name}' twice"):
        Bundle.open(pruned(change))


def test_positions_after_a_prune_point_are_supplied_where_they_are_counted_anew():
    assert inside().supplied() == ["keep_tokens.0", "keep_tokens.1"]
    assert inside(positions="renumbered").supplied()[2:] == ["position_ids.1", "position_ids.2"]


def test_layers_and_points_must_agree_in_python_too():
    with pytest.raises(UsageError, match="do not fit 2 prune points"):
        inside(layers=(0, 1, 2))


def test_tokens_by_layer_change_after_a_prune_layer():
    assert inside().kept_by_layer(4, (6, 3), 12) == (12, 6, 6, 3)
    assert inside(layers=(1, 2)).kept_by_layer(5, (6, 3), 12) == (12, 12, 6, 3, 3)


@pytest.mark.parametrize(
    ("pruning", "sentence"),
    [
        (
            LayerPruning("m", {}, (1,), "attention", "original", LayerBudget(1, 0.5)),
            "kept 288 of 576 visual tokens after the attention of layer 1, 50% removed",
        ),
        (
            LayerPruning("m", {}, (7, 15, 23), "layer", "renumbered", LayerBudget(3, 0.125)),
            "kept 288, 144 and 72 of 576 visual tokens after layers 7, 15 and 23, 87.5% removed in the end",
        ),
    ],
)
def test_a_sentence_for_people(pruning, sentence):
    assert pruning.describe(576, pruning.budget.kept(576)) == sentence


# --- paths ---

ESCAPES = [
    "/etc/passwd",
    "../secret",
    "onnx/../../secret",
    "a/../b.onnx",
    "..",
    "..\\secret",
    "C:\\secret",
    "a.onnx\0.txt",
    "",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_path_that_leaves_the_bundle_is_refused(folder, name):
    with pytest.raises(BundleError, match="outside the bundle") as caught:
        Bundle.open(folder).file(name)
    assert "source you trust" in caught.value.hint


@pytest.mark.parametrize("name", ESCAPES[:3])
@pytest.mark.parametrize(
    "place",
    [
        lambda d, name: d["graphs"]["a"].update(file=name),
        lambda d, name: d["graphs"]["a"].update(data=name),
        lambda d, name: d["text"].update(tokenizer=name),
        lambda d, name: d["text"].update(chat_template=name),
        lambda d, name: d.update(image_processor=name),
        lambda d, name: d["files"].update({name: {"size": 1, "sha256": "0"}}),
    ],
    ids=["graph", "data", "tokenizer", "template", "processor", "files"],
)
def test_no_field_of_the_manifest_can_leave_the_bundle(edit, place, name):
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(edit(lambda d: place(d, name)))


def test_a_link_out_of_the_bundle_is_refused(folder, tmp_path):
    content = (folder / "b.onnx").read_bytes()
    (tmp_path / "secret").write_bytes(content)
    (folder / "b.onnx").unlink()
    (folder / "b.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match=r"'b\.onnx', which lies outside"):
        Bundle.open(folder)


def test_a_folder_that_is_a_link_out_of_the_bundle_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("x")
    (folder / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(folder).file("onnx/x")


def test_a_neighbour_whose_name_begins_alike_is_outside(folder, tmp_path):
    (tmp_path / "bundle-other").mkdir()
    (folder / "link").symlink_to(tmp_path / "bundle-other")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(folder).file("link/x")


def test_a_bundle_in_the_cache_of_the_hub_is_whole(folder, tmp_path):
    snapshot = in_hub_cache(folder, tmp_path / "hub")
    assert all((snapshot / name).is_symlink() for name in (*FILES, MANIFEST))
    Bundle.open(snapshot).verify()


def test_one_of_several_bundles_in_a_cache_entry_is_whole(folder, tmp_path):
    snapshot = in_hub_cache(folder.parent, tmp_path / "hub")
    Bundle.open(snapshot / folder.name).verify()


def test_a_link_out_of_a_cache_entry_is_refused(folder, tmp_path):
    snapshot = in_hub_cache(folder, tmp_path / "hub")
    (snapshot / "b.onnx").unlink()
    (snapshot / "b.onnx").symlink_to(folder / "b.onnx")
    with pytest.raises(BundleError, match=r"'b\.onnx', which lies outside"):
        Bundle.open(snapshot)


def test_blobs_that_are_elsewhere_are_refused(folder, tmp_path):
    snapshot = in_hub_cache(folder, tmp_path / "hub")
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(snapshot)


def test_a_loop_of_links_is_refused(folder):
    (folder / "b.onnx").unlink()
    (folder / "b.onnx").symlink_to("b.onnx")
    with pytest.raises(BundleError, match=r"b\.onnx"):
        Bundle.open(folder)


# --- files ---


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"file {name} is missing"):
        Bundle.open(folder)


def test_a_folder_in_place_of_a_file_is_missing(folder):
    (folder / "b.onnx").unlink()
    (folder / "b.onnx").mkdir()
    with pytest.raises(BundleError, match=r"b\.onnx is missing"):
        Bundle.open(folder)


def test_a_name_that_no_system_takes_is_missing(edit):
    name = "x" * 5000
    with pytest.raises(BundleError, match="is missing"):
        Bundle.open(edit(lambda d: d["files"].update({name: {"size": 1, "sha256": "0"}})))


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_with_both_sizes(folder, name):
    size = (folder / name).stat().st_size
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"file {name} has {size - 1} bytes instead of {size}"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_of_the_same_size_is_found_by_verify(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[3] ^= 1
    (folder / name).write_bytes(content)
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=f"file {name} was altered"):
        bundle.verify()
    bundle.verify([other for other in FILES if other != name])


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_hash_is_refused(edit, name):
    with pytest.raises(BundleError, match=f"has no hash for {name}"):
        Bundle.open(edit(lambda d: d["files"].pop(name)))


def test_a_hash_of_another_spelling_does_not_pass(folder):
    manifest = manifest_of(folder)
    record = manifest.files["b.onnx"]
    files = manifest.files | {"b.onnx": replace(record, sha256=record.sha256[:-1])}
    with pytest.raises(BundleError, match="was altered"):
        Bundle(folder, replace(manifest, files=files)).verify()


def test_the_first_problem_is_always_the_same(folder):
    for name in FILES:
        (folder / name).unlink()
    found = set()
    for _ in range(3):
        with pytest.raises(BundleError) as caught:
            Bundle.open(folder)
        found.add(caught.value.what)
    assert found == {"The bundle's file tokenizer.json is missing."}


def test_the_manifest_holds_plain_json(folder):
    data = json.loads(manifest_of(folder).to_json())
    assert set(data) == {item.name for item in dataclasses.fields(Manifest)}
    assert data["graphs"]["a"]["inputs"][0] == {
        "name": "pixel_values",
        "dtype": "float32",
        "shape": ["T", 3, 8, 8],
    }
