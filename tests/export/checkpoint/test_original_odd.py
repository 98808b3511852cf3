"""Odd states of a checkpoint in LLaVA's original format, and of the files of its tokenizer."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from original import Original, write
from original_files import write_json
from safetensors.torch import load_file, save_file

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.checkpoint import loading, processors
from visprune.export.checkpoint.find import find
from visprune.export.graph import weightless
from visprune.runtime.vision.preprocess import ImageProcessor


@pytest.fixture(autouse=True)
def _silent():
    loading.silence_transformers()


def edit(file, **changes):
    found = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, found | changes)


def reweight(path, change):
    file = path / "model.safetensors"
    weights = load_file(file)
    save_file(change(weights), file, {"format": "pt"})


def processor(path):
    checkpoint = find(path)
    return processors.load_processor(checkpoint, loading.load_config(checkpoint))


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_fsdp_wrapped_module."])
def test_names_with_what_wrappers_add(prefix, tmp_path):
    written = write(tmp_path / "model", Original())
    reweight(written.path, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    loaded = weightless.load_model(find(written.path)).float()
    want = written.model.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())


def test_a_buffer_of_the_tower_is_no_tower(tmp_path):
    written = write(tmp_path / "model", Original(inside=False))
    ids = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    reweight(written.path, lambda weights: weights | {ids: torch.arange(17)[None]})
    assert [part.role for part in find(written.path).parts] == ["vision tower"]


def test_the_dtype_is_that_of_weights_and_not_of_a_buffer(tmp_path):
    written = write(tmp_path / "model", Original(dtype="bfloat16"))
    assert any(name.endswith("inv_freq") for name in load_file(written.path / "model.safetensors"))
    model, _ = weightless.open_model(find(written.path))
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("setting", "takes"),
    [
        ({"mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": None}, True),
        ({"mm_spatial_pool_mode": "average"}, False),
        ({"mm_spatial_pool_stride": 4}, False),
        ({"mm_newline_position": "grid"}, False),
        ({"add_faster_video": True}, False),
    ],
)
def test_only_onevisions_own_videos(setting, takes, tmp_path):
    written = write(tmp_path / "model", Original("llava_qwen", "anyres_max_9", siglip=True))
    edit(written.path / "config.json", **setting)
    assert (processor(written.path).text.video_token is not None) == takes


def test_colours_that_a_tower_leaves_open(tmp_path):
    written = write(tmp_path / "model", Original("llava_qwen", siglip=True))
    edit(written.tower / "preprocessor_config.json", image_mean=None, image_std=None)
    found = ImageProcessor.from_config(processor(written.path).image_processor)
    assert found.mean == found.std == (0.5, 0.5, 0.5)


def test_ids_that_a_conversion_would_change(tmp_path):
    path = write(tmp_path / "model", Original()).path
    rows = json.loads((path / "config.json").read_text())["vocab_size"]
    edit(path / "added_tokens.json", **{"<|im_start|>": rows + 3})
    with pytest.raises(CheckpointError, match=f"the id {rows + 3}, and the tokenizer's next free id is"):
        processor(path)


def test_ids_far_behind_the_table(tmp_path):
    path = write(tmp_path / "model", Original("llava_qwen", siglip=True)).path
    edit(path / "added_tokens.json", **{"<pad>": 10**12})
    assert find(path).placeholders["<image>"] < 10**4


def test_an_image_token_that_takes_spaces_for_its_own(tmp_path):
    path = write(tmp_path / "model", Original()).path
    rows = json.loads((path / "config.json").read_text())["vocab_size"]
    entry = {"content": "<image>", "special": True, "lstrip": True, "rstrip": True, "normalized": False}
    edit(path / "tokenizer_config.json", added_tokens_decoder={str(rows): entry})
    assert any("around <image> otherwise than LLaVA's code" in note for note in processor(path).notes)


@pytest.mark.parametrize(
    ("config", "tensor", "kind", "words"),
    [
        ({"architectures": ["LlavaQwenForCausalLM"]}, None, CheckpointError, "the model_type llava"),
        ({"image_aspect_ratio": f"anyres_max_{'9' * 5000}"}, None, UnsupportedError, "image_aspect_ratio"),
        ({"mm_hidden_size": "32"}, None, CheckpointError, "mm_hidden_size = '32'"),
        ({"vocab_size": 30_000_000}, None, CheckpointError, "vocab_size = 30000000"),
        ({}, "model.mm_projector.4.weight", UnsupportedError, "no part of the projector"),
        ({}, "model.vision_resampler.query", UnsupportedError, "no part of the projector"),
    ],
)
def test_contradictions_and_numbers_out_of_range(config, tensor, kind, words, tmp_path):
    path = write(tmp_path / "model", Original()).path
    edit(path / "config.json", **config)
    if tensor is not None:
        reweight(path, lambda weights: weights | {tensor: torch.ones(2, 2)})
    with pytest.raises(kind, match=words) as caught:
        find(path)
    assert len(caught.value.what) < 1000


def test_pinpoints_of_endless_digits(tmp_path):
    path = write(tmp_path / "model", Original("llava_mistral", "anyres")).path
    edit(path / "config.json", image_grid_pinpoints=f"(1x1),({'9' * 5000}x2)")
    with pytest.raises(CheckpointError, match="grid pinpoints") as caught:
        find(path)
    assert len(caught.value.what) < 1000


def test_a_tower_that_is_none(tmp_path):
    written = write(tmp_path / "model", Original(inside=False))
    reweight(written.tower, lambda weights: {f"model.{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(CheckpointError, match=f"vision tower {written.tower.name} lacks the tensor"):
        find(written.path)
    (written.tower / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config"):
        find(written.path)
