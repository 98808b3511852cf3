"""What can be wrong with a model or an export's options: one error each, and nothing on disk."""

from __future__ import annotations

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from visprune.errors import CheckpointError, ExportError, UnsupportedError, UsageError, VispruneError
from visprune.export import export


@pytest.fixture(scope="module")
def good(checkpoint):
    return checkpoint(checkpoint.Tiny())


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def edit(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def refused(kind, match, model, tmp_path, **options):
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(kind, match=match) as caught:
        export(model, output=tmp_path / "made" / "here", **({"method": "fopru-rank"} | options))
    assert isinstance(caught.value, VispruneError)
    assert caught.value.hint.endswith((".", "?"))
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_options(good, tmp_path):
    refused(UsageError, "fopru-rnk", good, tmp_path, method="fopru-rnk")
    for ratio in (0.0, -0.1, 1.01, float("nan"), float("inf")):
        refused(UsageError, "outside", good, tmp_path, ratio=ratio)
    refused(UsageError, "Both", good, tmp_path, ratio=0.5, keep_tokens=4)
    for count in (0, -1, 17):
        refused(UsageError, "Cannot keep", good, tmp_path, keep_tokens=count)
    refused(UsageError, "whole rows", good, tmp_path, method="fopru-row", keep_tokens=6)
    refused(UsageError, "keeps all", good, tmp_path, method="none", ratio=0.5)
    refused(UsageError, "jetpack5", good, tmp_path, target="jetpack5")
    refused(UsageError, "int3", good, tmp_path, dtype="int3")
    refused(UsageError, "'half'", good, tmp_path, verify="half")


def test_not_there(tmp_path):
    refused(CheckpointError, "no directory", tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    refused(CheckpointError, "no config.json", tmp_path / "empty", tmp_path)
    (tmp_path / "file").write_text("x")
    refused(CheckpointError, "is a file", tmp_path / "file", tmp_path)


def test_hub_id_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        export("nobody/nothing-at-all", method="none", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models(copy, tmp_path):
    edit(copy, model_type="qwen2_vl")
    refused(UnsupportedError, "'qwen2_vl' is not supported", copy, tmp_path)


def test_unsupported_parts(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    edit(copy, vision_feature_select_strategy="middle")
    refused(VispruneError, "strategy|configuration", copy, tmp_path)
    edit(copy, vision_feature_select_strategy="default", vision_feature_layer=-9)
    refused(CheckpointError, "hidden state -9", copy, tmp_path)
    edit(copy, vision_feature_layer=-2, quantization_config={"bits": 4})
    refused(UnsupportedError, "quantized", copy, tmp_path)
    config["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (copy / "config.json").write_text(json.dumps(config))
    refused(UnsupportedError, "rotary", copy, tmp_path)


def test_nonsense_in_the_configuration(copy, tmp_path):
    good = json.loads((copy / "config.json").read_text())
    for place, key, value, match in (
        (None, "vision_feature_layer", [], "names no feature layer"),
        ("vision_config", "patch_size", 0, "patches of 0"),
        ("vision_config", "image_size", [56, 28], r"pictures of \[56, 28\]|configuration"),
        (None, "image_token_id", None, "placeholder|configuration"),
        ("text_config", "model_type", "unheard-of", "configuration"),
        ("text_config", "attn_logit_softcapping", 50.0, "caps its attention logits"),
    ):
        config = json.loads(json.dumps(good))
        (config if place is None else config[place])[key] = value
        (copy / "config.json").write_text(json.dumps(config))
        refused(VispruneError, match, copy, tmp_path)
    (copy / "config.json").write_text("[" * 100_000)
    refused(CheckpointError, "not JSON", copy, tmp_path)


def test_row_pruning_without_a_square(checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny(tower="siglip"))
    refused(UnsupportedError, "square grid", path, tmp_path, method="fopru-row")


def test_an_attention_method_without_a_layer(checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny(feature_layer=0))
    refused(UnsupportedError, "no attention layer", path, tmp_path)


def test_weights(copy, tmp_path):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(CheckpointError, "header promises", copy, tmp_path)
    weights.write_bytes(whole[:6])
    refused(CheckpointError, "not safetensors", copy, tmp_path)
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,"x"]}}'
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    refused(CheckpointError, "not safetensors", copy, tmp_path)
    weights.write_bytes(b"\xff" * 100)
    refused(CheckpointError, "truncated", copy, tmp_path)
    weights.unlink()
    refused(CheckpointError, "no weights", copy, tmp_path)
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    refused(CheckpointError, "pickles", copy, tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(CheckpointError, "missing", copy, tmp_path)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    refused(CheckpointError, "outside", copy, tmp_path)


def rewrite(file, edit):
    """Change the header of a safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = edit(data[8 : 8 + length].decode()).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


@pytest.fixture
def sharded(copy):
    """The good checkpoint in three files, with its index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    places = {key: names[i % 3] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: v for k, v in tensors.items() if places[k] == name}, copy / name, {"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return copy


def test_shards_are_as_good_as_one_file(sharded, good, tmp_path):
    hashes = []
    for model in (sharded, good):
        bundle = export(model, method="none", output=tmp_path / f"{model.name}-out", verify=False)
        hashes.append({name: record.sha256 for name, record in bundle.manifest.files.items()})
    assert hashes[0] == hashes[1]


def test_shards_that_do_not_fit_together(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    whole, places = second.read_bytes(), json.loads(index.read_text())["weight_map"]
    name = next(key for key, file in places.items() if file == first.name)

    second.write_bytes(whole[: len(whole) // 2])
    refused(CheckpointError, f"{second.name} has .* header promises", sharded, tmp_path)
    second.unlink()
    refused(CheckpointError, f"{second.name} is missing", sharded, tmp_path)
    second.write_bytes(first.read_bytes())
    refused(CheckpointError, f"both in .*{first.name} and in {second.name}", sharded, tmp_path)
    second.write_bytes(whole)

    index.write_text(json.dumps({"weight_map": places | {name: second.name}}))
    refused(CheckpointError, f"says that {name} is in {second.name}", sharded, tmp_path)
    index.write_text(json.dumps({"weight_map": places | {"model.ghost": first.name}}))
    refused(CheckpointError, "says that model.ghost is in", sharded, tmp_path)
    index.write_text(json.dumps({"weight_map": places}).replace("{", f'{{"{name}": "{second.name}", ', 2))
    refused(CheckpointError, f"index.json names '{name}' twice", sharded, tmp_path)
    for nonsense in ({}, {name: 3}, [name], {name: [first.name]}):
        index.write_text(json.dumps({"weight_map": nonsense}))
        refused(CheckpointError, "cannot be read", sharded, tmp_path)
    index.unlink()
    refused(CheckpointError, "no model.safetensors.index.json", sharded, tmp_path)


def test_a_header_that_contradicts_itself(copy, tmp_path):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    name = next(key for key in json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")]) if "." in key)

    def change(match, **changes):
        def edit(text):
            header = json.loads(text)
            header[name] |= changes
            return json.dumps(header)

        file.write_bytes(whole)
        rewrite(file, edit)
        refused(CheckpointError, match, copy, tmp_path)

    change(f"shape of {name}", shape=[1, 2, 3])
    change(f"shape of {name}", shape=[-1, -1])
    change("shape of", dtype="F64")
    change("shape of", data_offsets=[0, 4])
    change("not safetensors", shape="wide")
    file.write_bytes(whole)
    rewrite(file, lambda text: text.replace("{", f'{{"{name}": {{}}, ', 1))
    refused(CheckpointError, f"names '{name}' twice", copy, tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I64"])
def test_weights_that_are_no_plain_numbers(dtype, copy, tmp_path):
    rewrite(copy / "model.safetensors", lambda text: text.replace('"F32"', f'"{dtype}"'))
    refused(UnsupportedError, f"is of type {dtype}", copy, tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_an_integer_buffer_and_other_floats_are_fine(dtype, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(checkpoint(checkpoint.Tiny(dtype=dtype)), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert export(path, method="none", output=tmp_path / "out").manifest.parity.verified


def test_weights_of_another_model(copy, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(CheckpointError, "lack 1 of 80 tensors: lm_head.weight", copy, tmp_path)


def test_processor(copy, tmp_path):
    (copy / "tokenizer.json").unlink()
    refused(CheckpointError, "processor|tokenizer", copy, tmp_path)


def test_placeholder_of_another_tokenizer(copy, tmp_path):
    edit(copy, image_token_id=300)
    refused(CheckpointError, "placeholder", copy, tmp_path)


def test_too_little_memory_or_disk(good, tmp_path, monkeypatch):
    """Said before anything is written, not by the kernel half-way."""
    import collections

    from visprune.export.checkpoint import resources

    monkeypatch.setattr(resources, "available_memory", lambda: 1000)
    refused(ExportError, "self-check needs about", good, tmp_path, verify="whole")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: usage(10, 5, 5))
    refused(ExportError, "bundle needs about", good, tmp_path)


def test_output_that_exists(good, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep me")
    with pytest.raises(UsageError, match="exists"):
        export(good, method="none", output=out)
    with pytest.raises(UsageError, match="not a bundle"):
        export(good, method="none", output=out, force=True)
    assert (out / "precious").read_text() == "keep me"
