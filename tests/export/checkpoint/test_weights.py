"""Weights read from their files: the values transformers loads, for checkpoints of every age and kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from visprune.errors import CheckpointError
from visprune.export.checkpoint.find import find
from visprune.export.files.shards import read_headers
from visprune.export.graph import weightless

EXPERTS = (("moe_intermediate_size", 16), ("num_experts", 12), ("num_experts_per_tok", 2))
CASES = {
    "clip-llama": {},
    "siglip-qwen2-tied": {"tower": "siglip", "strategy": "full", "text": "qwen2", "tied": True},
    "bfloat16": {"dtype": "bfloat16", "text": "mistral"},
    "gemma-tied": {"text": "GemmaConfig", "head_dim": 16, "tied": True, "dtype": "bfloat16"},
    "experts-merged": {"text": "Qwen3MoeConfig", "text_extra": EXPERTS},
    "matrices-in-one": {"text": "Phi3Config"},
}


def expected(path):
    return transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype="auto").eval()


def tensors(model):
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_equal(found, path):
    want, have = tensors(expected(path)), tensors(found)
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == tensor.dtype, name
        assert torch.equal(have[name], tensor), name


def rewritten(path, names, shards=1):
    """The checkpoint with other names on disk, those of None left out, in several files."""
    old = load_file(path / "model.safetensors")
    new = {names(name): tensor for name, tensor in old.items() if names(name) is not None}
    (path / "model.safetensors").unlink()
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: new[name] for name in sorted(new)[index::shards]}
        save_file(part, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.fixture
def copy(checkpoint, tmp_path):
    return lambda **changes: Path(shutil.copytree(checkpoint(checkpoint.Tiny(**changes)), tmp_path / "model"))


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_what_transformers_loads(case, checkpoint):
    path = checkpoint(checkpoint.Tiny(**CASES[case]))
    assert_equal(weightless.load_model(find(path)), path)


def test_names_of_newer_checkpoints_in_shards(copy):
    newer = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    path = copy()
    before = weightless.load_model(find(path))
    old = read_headers(find(path).weights)
    rewritten(
        path,
        lambda name: next(to + name.removeprefix(by) for by, to in newer.items() if name.startswith(by)),
        3,
    )
    new = read_headers(find(path).weights)
    assert len(new) == len(old)
    assert not new.keys() & old.keys()
    after = weightless.load_model(find(path))
    assert_equal(after, path)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize(
    "stored", ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]
)
def test_tied_and_only_one_of_them_stored(copy, stored):
    path = rewritten(
        copy(tied=True), lambda name: stored if "embed_tokens" in name or "head" in name else name
    )
    model, weights = weightless.open_model(find(path))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.lm_head.weight.is_meta
    loaded = weightless.load_model(find(path))
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, weights.read(model.lm_head.weight))
    assert_equal(loaded, path)


def test_tied_and_both_stored_with_other_values(copy):
    """The configuration is wrong then, and transformers goes by the weights."""
    path = copy(tied=True)
    weights = load_file(path / "model.safetensors")
    (name,) = (name for name in weights if "embed_tokens" in name or "head" in name)
    other = "lm_head.weight" if "embed" in name else "model.embed_tokens.weight"
    other = f"language_model.{other}"
    save_file(weights | {other: weights[name] + 1}, path / "model.safetensors", {"format": "pt"})
    assert_equal(weightless.load_model(find(path)), path)


def test_parameters_stay_on_disk(checkpoint):
    path = checkpoint(checkpoint.Tiny())
    model, weights = weightless.open_model(find(path))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    layer = model.model.language_model.layers[1]
    stored = layer.mlp.up_proj.weight
    with weights.loaded(layer, torch.float64):
        assert layer.mlp.up_proj.weight.dtype == torch.float64
        assert torch.equal(layer.mlp.up_proj.weight, weights.read(stored).double())
    assert layer.mlp.up_proj.weight is stored
    assert not layer.self_attn.q_proj.weight.requires_grad
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


def test_lacking_tensors_are_named(copy):
    path = rewritten(copy(), lambda name: None if "model.layers.1.mlp" in name else name)
    with pytest.raises(CheckpointError, match=r"lack 3 of \d+ tensors: model\.language_model\.layers\.1"):
        weightless.open_model(find(path))


def test_other_shapes_than_the_configuration_has(copy):
    path = copy()
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"do not fit its config.json: .* is \[.*\] and not \[.*\]"):
        weightless.open_model(find(path))


def test_a_file_that_became_shorter(copy):
    path = copy()
    model, weights = weightless.open_model(find(path))
    file = path / "model.safetensors"
    last = max(read_headers([file]).values(), key=lambda tensor: tensor.offset)
    file.write_bytes(file.read_bytes()[: last.offset + 1])
    with pytest.raises(CheckpointError, match="became shorter"):
        weights.fill(model)
