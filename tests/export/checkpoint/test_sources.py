"""Where a checkpoint comes from: the hub's cache, a revision of it, and code that lies beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from visprune.cli import run_command
from visprune.errors import CheckpointError, UsageError
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.find import find
from visprune.export.preview import preview

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
ID = "somebody/tiny-llava"


@pytest.fixture(scope="module")
def hub(checkpoint, tmp_path_factory):
    """A hub's cache as its own client lays it out, with two commits of one model: `main` is the newer one."""
    cache = tmp_path_factory.mktemp("hub")
    root = cache / f"models--{ID.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    for commit, seed, refs in ((OLD, 1, ("v1.0",)), (NEW, 2, ("main",))):
        folder = root / "snapshots" / commit
        folder.mkdir(parents=True)
        for file in checkpoint(checkpoint.Tiny(seed=seed)).iterdir():
            blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            (folder / file.name).symlink_to(os.path.relpath(blob, folder))
        for ref in refs:
            (root / "refs" / ref).write_text(commit)
    return cache


@pytest.fixture
def offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, NEW), ("main", NEW), ("v1.0", OLD), (OLD, OLD), (NEW, NEW)]
)
@pytest.mark.usefixtures("offline")
def test_a_revision_is_a_branch_a_tag_or_a_commit(revision, commit):
    found = find(ID, CheckpointOptions(revision=revision))
    assert (found.name, found.short_name, found.revision) == (ID, "tiny-llava", commit)
    assert found.path.name == commit
    assert found.weights[0].is_symlink()  # into the cache's blobs, which is no way out of the checkpoint


@pytest.mark.usefixtures("offline")
def test_a_dry_run_takes_what_is_in_the_cache_and_downloads_nothing(tmp_path):
    found = preview(ID, revision="v1.0", method="none", output=tmp_path / "out")
    assert (found.model, found.revision) == (ID, OLD)
    with pytest.raises(CheckpointError, match="not in the hub's cache, and a dry run") as caught:
        preview(ID, revision="v2.0", method="none", output=tmp_path / "out")
    assert caught.value.hint.endswith(f"hf download {ID} --revision v2.0")


@pytest.mark.parametrize(("model", "revision"), [(ID, "v2.0"), (ID, "f" * 40), ("somebody/else", None)])
@pytest.mark.usefixtures("offline")
def test_what_is_not_in_the_cache_and_cannot_be_had(model, revision):
    with pytest.raises(CheckpointError, match=f"{model}.* could not be downloaded: .") as caught:
        find(model, CheckpointOptions(revision=revision))
    assert (revision or model) in caught.value.what
    assert "revision and the network" in caught.value.hint


@pytest.mark.parametrize("place", ["directory", "demo"])
def test_a_revision_of_something_that_has_none(place, checkpoint):
    model = checkpoint(checkpoint.Tiny()) if place == "directory" else None
    with pytest.raises(UsageError, match="A revision belongs to a hub id") as caught:
        find(model, CheckpointOptions(revision="main"))
    assert "--revision" in caught.value.hint


def test_the_command_exports_a_revision_and_records_its_commit(hub, tmp_path):
    arguments = [ID, "--revision", "v1.0", "--method", "none", "--no-verify", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "visprune", "export", *arguments],
        env=os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    source = json.loads((tmp_path / "out" / "visprune.json").read_text())["source"]
    assert (source["model"], source["revision"]) == (ID, OLD)


# --- code beside the weights ---


@pytest.fixture
def coded(checkpoint, tmp_path, monkeypatch):
    """Make a checkpoint that names code of its own in one file; it leaves a mark when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    mark = tmp_path / "it-ran"
    base = {
        "AutoConfig": "LlavaConfig",
        "AutoProcessor": "LlavaProcessor",
        "AutoTokenizer": "PreTrainedTokenizerFast",
        "AutoImageProcessor": "CLIPImageProcessorPil",
    }

    def make(file, auto, **changes):
        path = shutil.copytree(checkpoint(checkpoint.Tiny()), tmp_path / "model")
        (path / "own.py").write_text(
            f"from transformers import {base[auto]}\n"
            f"open({str(mark)!r}, 'w').close()\n"
            f"class Own({base[auto]}): pass\n"
        )
        if auto == "AutoImageProcessor":  # in a file of its own, which is read where the other is missing
            whole = json.loads((path / "processor_config.json").read_text())
            (path / "processor_config.json").unlink()
            (path / file).write_text(json.dumps(whole["image_processor"]))
        settings = json.loads((path / file).read_text())
        names = "own.Own" if auto != "AutoTokenizer" else [None, "own.Own"]
        (path / file).write_text(json.dumps(settings | {"auto_map": {auto: names}} | changes))
        return path, mark

    return make


CASES = [
    ("config.json", "AutoConfig"),
    ("processor_config.json", "AutoProcessor"),
    ("tokenizer_config.json", "AutoTokenizer"),
    ("preprocessor_config.json", "AutoImageProcessor"),
]


def read(path, *, trusted):
    """All that an export reads of a checkpoint."""
    from visprune.export.checkpoint import loading, processors
    from visprune.export.graph import weightless

    loading.silence_transformers()
    checkpoint = find(path, CheckpointOptions(trust_remote_code=trusted))
    assert checkpoint.revision is None  # a directory has none
    config = loading.load_config(checkpoint)
    processors.load_processor(checkpoint, config)
    return config, weightless.load_model(checkpoint)


@pytest.mark.parametrize(("file", "auto"), CASES)
def test_code_beside_the_weights_never_runs_unasked(file, auto, coded):
    """Where transformers has the class itself, it works without that code."""
    path, mark = coded(file, auto)
    read(path, trusted=False)
    assert not mark.exists()


def test_trusted_code_runs(coded):
    path, mark = coded(*CASES[0])
    config, model = read(path, trusted=True)
    assert mark.exists()
    assert type(model.config) is type(config)


def test_a_decoder_of_the_checkpoints_own_is_refused_and_its_code_never_runs(coded, tmp_path, capsys):
    path, mark = coded("config.json", "AutoConfig", model_type="llava", text_config={"model_type": "own"})
    arguments = [str(path), "--method", "none", "--no-verify", "-o", str(tmp_path / "out")]
    assert run_command("export", arguments) == 2
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    assert "cannot be read" in capsys.readouterr().err


def test_an_image_processor_of_the_checkpoints_own_is_refused_and_never_runs(coded, tmp_path, capsys):
    path, mark = coded("preprocessor_config.json", "AutoImageProcessor", image_processor_type="Own")
    arguments = [str(path), "--method", "none", "-o", str(tmp_path / "out"), "--trust-remote-code"]
    assert run_command("export", arguments) == 2
    assert "type is 'Own'" in capsys.readouterr().err  # which the runtime does not know
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
