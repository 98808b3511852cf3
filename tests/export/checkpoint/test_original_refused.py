"""What can be wrong with a checkpoint in LLaVA's original format: one error each, and nothing on disk."""

from __future__ import annotations

import json
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from checkpoints import config
from original import Original, write
from original_files import store, write_json
from original_tower import write_tower
from safetensors.torch import load_file, save_file

from visprune.cli import run_command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a checkpoint once for each form; tests restore what they change: `made(Original()) -> Written`."""
    done = {}

    def make(original):
        if original not in done:
            done[original] = write(tmp_path_factory.mktemp("original") / "model", original)
        return done[original]

    return make


@pytest.fixture
def refused(made, tmp_path, monkeypatch, capsys):
    """Run the command on an altered checkpoint; return its message, which is two sentences or more."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(original, *options, file="config.json", part="path", **changes):
        place = getattr(made(original), part) / file
        before = place.read_text()
        altered = json.loads(before) | changes
        write_json(place, {key: value for key, value in altered.items() if value is not ...})
        try:
            return message(made(original).path, *options)
        finally:
            place.write_text(before)

    def message(path, *options):
        out = tmp_path / "made" / "here"
        code = run_command("export", [str(path), "--method", "none", *options, "-o", str(out)])
        said = capsys.readouterr().err
        assert code == 2, said
        assert not out.parent.exists()
        assert "Traceback" not in said
        assert len(re.findall(r"[.?:]\s", f"{said} ")) >= 2, said
        return said

    run.message = message
    return run


FIXED, TILED, SIGLIP = (
    Original(inside=False),
    Original("llava_mistral", "anyres"),
    Original("llava_qwen", "anyres_max_9", siglip=True, inside=False),
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/no-such-tower", "nobody/no-such-tower"),
        ("./checkpoints/gone/tower", "no such directory"),
        (None, "mm_vision_tower"),
        (..., "mm_vision_tower"),
        (7, "mm_vision_tower"),
    ],
    ids=["no network", "no directory", "null", "missing", "a number"],
)
def test_no_tower(name, words, refused):
    said = refused(FIXED, mm_vision_tower=name)
    assert words in said
    assert "--vision-tower" in said


def test_a_tower_that_the_user_names_and_that_is_not_there(refused, made, tmp_path):
    assert "no-such" in refused(FIXED, "--vision-tower", "nobody/no-such")
    (tmp_path / "empty").mkdir()
    said = refused.message(made(FIXED).path, "--vision-tower", str(tmp_path / "empty"))
    assert "empty" in said


@pytest.mark.parametrize("original", [FIXED, SIGLIP], ids=["CLIP", "SigLIP"])
def test_a_tower_of_another_width(original, refused, made, tmp_path):
    vision = config(original.tiny).vision_config
    vision.hidden_size = 32
    write_tower(tmp_path / "wide", vision)
    said = refused.message(made(original).path, "--vision-tower", str(tmp_path / "wide"))
    assert "32" in said
    assert "24" in said


def test_a_projector_of_another_width(refused):
    said = refused(FIXED, mm_hidden_size=32)
    assert "32" in said
    assert "24" in said


@pytest.mark.parametrize("kind", ["resnet", "vit", None])
def test_a_tower_of_another_kind(kind, refused):
    assert "CLIP and SigLIP" in refused(FIXED, file="config.json", part="tower", model_type=kind)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "image_size", "patch_size"])
def test_nonsense_in_the_configuration_of_a_tower(key, refused, made):
    vision = json.loads((made(SIGLIP).tower / "config.json").read_text())["vision_config"]
    for value in ("many", -1, None, [], 1.5):
        refused(SIGLIP, part="tower", vision_config=vision | {key: value})


REFUSED = {
    "mm_projector_type": ("mlp3x_gelu", "resampler", "ldpnet", 5, {}),
    "mm_resampler_type": ("perceiver", "spatial_pool", "masked_drop"),
    "image_aspect_ratio": ("crop_split", "highres", "anyres_max_0", "anyres_max_", "anyres_max_x", 7, []),
    "mm_vision_select_feature": ("slicefour_patch", "middle", 3),
    "mm_vision_select_layer": ("last", 9, None, [[-2]]),
    "vocab_size": ("many", None, 1.5, True, []),
    "model_type": ("llava_mpt", "llava_gemma", "llava_phi"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_fields_that_are_not_known(key, refused):
    for value in REFUSED[key]:
        said = refused(FIXED, **{key: value}, **({"architectures": ...} if key == "model_type" else {}))
        assert str(value) in said or key in said, (value, said)


def test_errors_name_what_is_known(refused):
    assert "mlp2x_gelu" in refused(FIXED, mm_projector_type="ldpnet")
    said = refused(FIXED, image_aspect_ratio="highres")
    assert "pad" in said
    assert "anyres" in said
    assert "spatial_unpad" in refused(TILED, mm_patch_merge_type="weird")
    said = refused(FIXED, model_type="llava_mpt", architectures=["LlavaMptForCausalLM"])
    assert "llava_qwen" in said
    assert "llava_mistral" in said


@pytest.mark.parametrize(
    "grid",
    [
        *("", "many", "(0x0),...,(0x0)", "(3x3),...,(1x1)", "[[56, 112]", "[]", "__import__('os')"),
        *([], None, ..., 56, [56, 112], [["a", "b"]], [[56, 112, 3]], [[57, 112]], [[-56, 56]], {}),
    ],
    ids=repr,
)
def test_tiles_that_make_no_sense(grid, refused):
    assert "image_grid_pinpoints" in refused(TILED, image_grid_pinpoints=grid)


def test_a_tower_for_a_checkpoint_that_has_its_own_format(checkpoint, refused, made):
    path = checkpoint(checkpoint.Tiny())
    said = refused.message(path, "--vision-tower", str(made(FIXED).tower))
    assert "Leave --vision-tower out" in said


class Opens:
    """A pickle of this is code that runs when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_pickle_that_wants_more_than_tensors(refused, tmp_path):
    mark = tmp_path / "it-ran"
    written = write(tmp_path / "model", Original(storage="pickle"))
    said = refused.message(written.path)
    assert "--pickled-weights" in said
    file = written.path / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    torch.save(weights | {"model.extra": Opens(mark)}, file)
    said = refused.message(written.path, "--pickled-weights")
    assert "open" in said
    assert not mark.exists()
    file.write_bytes(file.read_bytes()[:1000])
    assert "pytorch_model.bin" in refused.message(written.path, "--pickled-weights")


@pytest.fixture
def altered(tmp_path):
    """Make a checkpoint whose tensors a function alters: `altered(original, function) -> Path`."""

    def make(original, change):
        written = write(tmp_path / "model", original)
        file = written.path / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})
        return written

    return make


@pytest.mark.parametrize(
    "missing",
    [
        *("model.layers.1.mlp.up_proj.weight", "model.mm_projector.2.bias", "model.image_newline"),
        *("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "lm_head.weight"),
    ],
)
def test_a_tensor_that_is_missing(missing, refused, altered):
    written = altered(TILED, lambda weights: weights.pop(missing))
    said = refused.message(written.path)
    assert "lack 1 of" in said
    assert missing.split(".")[-1] in said


def test_a_table_of_another_size(refused, altered):
    name = "model.embed_tokens.weight"
    written = altered(FIXED, lambda weights: weights.update({name: weights[name][:-3].clone()}))
    said = refused.message(written.path)
    assert "a table of 337 tokens, and vocab_size = 340" in said


def test_the_shards_of_a_tower_are_not_all_there(refused, tmp_path):
    written = write(tmp_path / "model", Original(inside=False, tower_storage="shards"))
    shard = written.tower / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert "model-00002-of-00003.safetensors is missing" in refused.message(written.path)
    for file in written.tower.glob("model*"):
        file.unlink()
    store(written.tower, {"visual.weight": torch.ones(3)}, "safetensors")
    assert "vision" in refused.message(written.path)
