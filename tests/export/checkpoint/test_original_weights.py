"""The sources of the weights of an original LLaVA checkpoint, and what the manifest says of them."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from original import Original, write
from original_files import write_json

from visprune.cli import run_command
from visprune.export import export
from visprune.export.checkpoint import loading
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.find import find
from visprune.export.graph import weightless

STORED = {
    "one file": Original("llava_llama"),
    "shards": Original("llava_llama", storage="shards", dtype="bfloat16"),
    "pickle": Original(storage="pickle", dtype="float32"),
    "pickled shards": Original(storage="pickled shards"),
    "pickled shards, tower elsewhere": Original(inside=False, storage="pickled shards", dtype="bfloat16"),
    "both pickled": Original(inside=False, storage="pickled shards", tower_storage="pickle"),
    "tower pickled": Original("llava_mistral", "anyres", inside=False, tower_storage="pickle"),
    "tower elsewhere": Original("llava_mistral", "anyres", inside=False, dtype="bfloat16", seed=3),
    "tower in shards": Original("llava_mistral", "anyres", inside=False, tower_storage="shards"),
    "1.6 of Vicuna": Original("llava", "anyres", storage="shards"),
    "tied": Original("llava_qwen", "anyres_max_9", siglip=True, tied=True, storage="shards"),
    "tied, pickled": Original("llava_qwen", "anyres_max_9", siglip=True, tied=True, storage="pickle"),
    "tied, tower elsewhere": Original("llava_qwen", "anyres_max_9", siglip=True, tied=True, inside=False),
    "untied OneVision": Original("llava_qwen", "anyres_max_9", siglip=True, dtype="bfloat16"),
    "tiles of SigLIP": Original("llava_qwen", "anyres", siglip=True, dtype="float32"),
    "tiles of CLIP for Qwen": Original("llava_qwen", "anyres_max_9", dtype="bfloat16"),
    "interleave": Original("llava_qwen", siglip=True, tied=True),
}

GRIDS = {
    "[[56, 112], [112, 56]]": [(112, 56), (56, 112)],
    "[(56, 112), (112, 56), (224, 56)]": [(112, 56), (56, 112), (56, 224)],
    "(1x1),...,(2x2)": [(56, 56), (112, 56), (56, 112), (112, 112)],
    "(1x2),...,(2x3)": [(112, 56), (168, 56), (112, 112), (168, 112)],
}


def assert_holds(path, model, **options):
    """Check that all values of a checkpoint are those of a model of transformers."""
    checkpoint = find(path, CheckpointOptions(**options))
    found, weights = weightless.open_model(checkpoint)
    weights.fill(found)
    assert checkpoint.notes + weights.notes == ()
    want, have = model.state_dict(), found.state_dict()
    assert type(found) is type(model)
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(have[name].float(), tensor), name
    buffers = dict(model.named_buffers())
    for name, tensor in found.named_buffers():  # rotary frequencies, which are computed and not read
        assert torch.equal(tensor, buffers[name]), name
    return checkpoint, found


def sha256_of(*files):
    """The hash that a manifest has of several files: over their names and hashes."""
    lines = (f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("case", STORED, ids=list(STORED))
def test_the_values_of_transformers(case, tmp_path):
    original = STORED[case]
    written = write(tmp_path / "model", original)
    pickles = "pickle" in original.storage + original.tower_storage
    _, found = assert_holds(written.path, written.model, pickled_weights=pickles)
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == original.tied
    want, have = written.model.config, found.config
    for name in ("image_grid_pinpoints", "vision_feature_select_strategy", "vision_aspect_ratio"):
        assert getattr(have, name, None) == getattr(want, name, None), name
    for name in ("rope_parameters", "rms_norm_eps", "sliding_window", "hidden_act", "head_dim"):
        assert getattr(have.text_config, name, None) == getattr(want.text_config, name, None), name


def test_a_tower_inside_is_the_one_that_counts(tmp_path):
    """The one that `mm_vision_tower` names has its values before the training of the model."""
    written = write(tmp_path / "model", Original("llava_mistral", "anyres"))
    checkpoint, _ = assert_holds(written.path, written.model)
    assert checkpoint.parts == ()
    (written.tower / "model.safetensors").unlink()
    assert_holds(written.path, written.model)


@pytest.mark.parametrize("siglip", [False, True], ids=["CLIP", "SigLIP"])
def test_a_tower_that_the_user_names(siglip, tmp_path):
    form = Original("llava_qwen", "anyres", siglip=siglip, inside=False)
    written = write(tmp_path / "model", form)
    moved = tmp_path / "elsewhere" / "tower"
    shutil.move(written.tower, moved)
    checkpoint, _ = assert_holds(written.path, written.model, vision_tower=moved)
    assert [(part.role, part.name, part.revision) for part in checkpoint.parts] == [
        ("vision tower", "tower", None)
    ]
    assert_holds(written.path, written.model, vision_tower=str(moved))


def test_a_tower_that_the_user_names_replaces_the_named_one(tmp_path):
    """For a checkpoint without a tower, whichever `mm_vision_tower` exists."""
    written = write(tmp_path / "model", Original(inside=False))
    other = write(tmp_path / "other", Original(inside=False, seed=8))
    _, found = (find(written.path, CheckpointOptions(vision_tower=tower)) for tower in (None, other.tower))
    want = other.model.model.vision_tower.state_dict()
    have = weightless.load_model(found).model.vision_tower.state_dict()
    assert all(torch.equal(have[name].float(), tensor) for name, tensor in want.items())


def test_a_tower_alone_without_its_text_tower(tmp_path):
    """As a `CLIPVisionModel` is saved, whose configuration is that of the tower itself."""
    from safetensors.torch import load_file, save_file

    written = write(tmp_path / "model", Original(inside=False))
    config = json.loads((written.tower / "config.json").read_text())
    write_json(written.tower / "config.json", config["vision_config"])
    weights = load_file(written.tower / "model.safetensors")
    seen = {name: tensor for name, tensor in weights.items() if name.startswith("vision_model.")}
    save_file(seen, written.tower / "model.safetensors", {"format": "pt"})
    assert_holds(written.path, written.model)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "elsewhere"])
def test_the_manifest_names_both_sources(inside, tmp_path, capsys):
    written = write(tmp_path / "my-llava", Original(inside=inside), tmp_path / "my-clip")
    arguments = [str(written.path), "--method", "none", "--no-verify"]
    assert run_command("export", [*arguments, "--dry-run", "-o", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    assert "my-llava" in capsys.readouterr().out
    source = export(written.path, method="none", output=tmp_path / "out", verify=False).manifest.source
    own, tower = written.path / "model.safetensors", written.tower / "model.safetensors"
    assert (source.model, source.model_type, source.text_type) == ("my-llava", "llava", "llama")
    if inside:
        assert source.parts == ()
        assert source.weights_sha256 == sha256_of(own)
        return
    (part,) = source.parts
    assert (part.role, part.name, part.revision) == ("vision tower", "my-clip", None)
    assert part.sha256 == sha256_of(tower)
    assert source.weights_sha256 == sha256_of(own, tower)


def test_a_text_only_template_of_the_tokenizer_gives_way(tmp_path):
    """Checkpoints of llava_qwen have Qwen's own, which knows no pictures."""
    written = write(tmp_path / "model", Original("llava_qwen", siglip=True))
    file = written.path / "tokenizer_config.json"
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{% endfor %}"
    )
    write_json(file, json.loads(file.read_text()) | {"chat_template": template})
    bundle = export(written.path, method="none", output=tmp_path / "out", verify=False)
    assert "<image>" in (bundle.path / "chat_template.jinja").read_text()


@pytest.mark.parametrize("text", GRIDS)
def test_tiles_that_are_written_as_text(text, tmp_path):
    """As (height, width) afterwards, as transformers has them."""
    written = write(tmp_path / "model", Original("llava_mistral", "anyres"))
    file = written.path / "config.json"
    write_json(file, json.loads(file.read_text()) | {"image_grid_pinpoints": text})
    found = loading.read_config(find(written.path)).image_grid_pinpoints
    assert [tuple(size) for size in found] == GRIDS[text]
