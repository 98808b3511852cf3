"""An export with a recipe that FitPrune's authors published: its answers, its note, and its records."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from plain_llava import Reference, fitprune

import visprune
from visprune.bundle import Bundle
from visprune.cli import run_command
from visprune.errors import UsageError
from visprune.pruning.published import open_recipe, published_recipes
from visprune.rebuild import export_command
from visprune.runtime.vision.kept_tokens import keep_for

NAME = "published:llava-1.5-7b-90"
RECIPE = published_recipes()["llava-1.5-7b-90"]
NEW = 6


@pytest.fixture(scope="module")
def model(checkpoint):
    """32 layers, 36 visual tokens."""
    return checkpoint(checkpoint.Tiny(layers=32, side=6, tower_layers=2, lively=True))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The folder of the bundle, and what the command printed on stderr."""
    folder = tmp_path_factory.mktemp("bundle") / "out"
    arguments = [str(model), "--method", "fitprune", "--recipe", NAME, "--no-verify", "-o", str(folder)]
    with redirect_stderr(io.StringIO()) as said:
        assert run_command("export", arguments) == 0
    return folder, said.getvalue()


def test_answers_equal_the_reference(model, exported, pictures):
    """The counts for 576 tokens are scaled to 36."""
    scheme = {layer: count for layer, count in enumerate(RECIPE.scheme) if count}
    reference = Reference(model, fitprune(scheme, 576))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    wanted = reference.turn([message], pictures[:1], NEW)
    with visprune.load(exported[0]) as pipeline:
        answer = pipeline.generate(pictures[0], "What is it?", max_new_tokens=NEW)
    assert answer.token_ids == wanted
    assert answer.keep_indices == tuple(reference.keep_indices)
    assert answer.layer_tokens == tuple(reference.layer_tokens)
    assert (answer.layer_tokens[0], answer.layer_tokens[1], answer.layer_tokens[-1]) == (36, 20, 3)


def test_the_export_says_what_was_fitted_on_what(model, exported):
    said = exported[1].splitlines()
    note = RECIPE.note(model.name, 36)
    assert said.count(note) == 1
    for words in (NAME, "LLaVA-1.5-7B", model.name, "576 visual tokens and are scaled to the 36 that enter"):
        assert words in note


def test_the_bundle_says_which_recipe_it_has(exported, capsys):
    folder = exported[0]
    assert open_recipe(folder / "recipe.json") == RECIPE
    manifest = Bundle.open(folder).manifest
    options = manifest.layer_pruning.options
    assert (options["recipe"], options["source"]) == (NAME, RECIPE.source)
    assert tuple(options["scheme"]) == RECIPE.scheme
    assert "2409.10197" in RECIPE.source
    assert run_command("inspect", [str(folder)]) == 0
    inside = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("inside"))
    for words in ("scheme: 32 values", "visual_tokens=576", "work=0.1032", f"recipe={NAME}", "3 of 36"):
        assert words in inside
    assert export_command(manifest).endswith(f"--method fitprune --recipe {NAME}")


def test_the_recipe_of_a_bundle_makes_the_same_again(model, exported):
    folder = exported[0]
    manifest = Bundle.open(folder).manifest
    for recipe in (folder / "recipe.json", NAME):
        found = visprune.preview(model, method="fitprune", recipe=recipe)
        assert found.kept == keep_for(manifest).describe(manifest)
        assert [graph.name for graph in found.graphs] == list(manifest.graphs)
        assert found.notes == (RECIPE.note(model.name, 36),)


def test_after_another_method(model, capsys):
    arguments = [str(model), "-m", "uniform", "--ratio", "0.5", "--then", "fitprune", "--recipe"]
    assert run_command("export", [*arguments, "published:llava-1.5-7b-20", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "scaled to the 18 that enter the decoder here" in printed
    assert "It removes 15.3% of the visual work, and not the 20% of its name." in printed


def test_another_depth_is_refused(checkpoint, tmp_path):
    two = checkpoint(checkpoint.Tiny())
    for make in (visprune.export, visprune.preview):
        with pytest.raises(UsageError, match=r"32 layers of LLaVA-1\.5-7B, and .* has 2") as caught:
            make(two, method="fitprune", recipe=NAME, output=tmp_path / "out")
        assert "visprune fit MODEL --ratio 0.1" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_misspelt_name_is_refused_before_a_model_is_looked_for(tmp_path):
    with pytest.raises(UsageError, match="no published recipe 'llava-1'"):
        visprune.export("no/such-model", method="fitprune", recipe="published:llava-1")


def test_the_recipe_as_json(model, capsys):
    arguments = [str(model), "-m", "fitprune", "--recipe", NAME, "--dry-run", "--json"]
    assert run_command("export", arguments) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [RECIPE.note(model.name, 36)]
