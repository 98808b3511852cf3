"""Recipe files: a written recipe is read again, and a wrong one is refused with the file's name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from visprune.errors import BundleError, UsageError
from visprune.pruning.recipe import Fit, Recipe, read_recipe, write_recipe

FIT = Fit((2, 1, 0), 0.25, 0.49, 0.51, (0.1, 0.2, -0.1), (0.0, 0.1, 0.2))


def recipe(**changes):
    return Recipe(
        **{
            "schema_version": 1,
            "method": "fitprune",
            "model": "tiny",
            "weights_sha256": "ab" * 32,
            "num_layers": 3,
            "hidden_size": 8,
            "intermediate_size": 16,
            "visual_tokens": 6,
            "convention": "F3, MAC, visual tokens only",
            "ratio": 0.5,
            "samples": 4,
            "seed": 0,
            "max_prune_points": None,
            **asdict(FIT),
            **changes,
        }
    )


def test_what_is_written_is_read(tmp_path):
    for index, made in enumerate([recipe(), recipe(max_prune_points=2, unconstrained=FIT)]):
        path = tmp_path / f"{index}.json"
        write_recipe(made, path)
        assert read_recipe(path) == made
        assert read_recipe(str(path)).prune_points == (0, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"0.json", "1.json"}


def test_the_true_ratio_counts_what_enters_and_what_is_left():
    # n: 6 -> 4 -> 3 -> 3; pre = 3 n d^2 + 2 n^2 d, post = n d^2 + 3 n d m
    def pre(n):
        return 3 * n * 64 + 2 * n * n * 8

    def post(n):
        return n * 64 + 3 * n * 8 * 16

    wanted = (pre(6) + post(4) + pre(4) + post(3) + pre(3) + post(3)) / (3 * (pre(6) + post(6)))
    assert recipe().true_ratio() == pytest.approx(wanted, abs=1e-15)
    assert recipe(scheme=(0, 0, 0)).true_ratio() == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": (2, 1)}, "scheme has 2 layers"),
        ({"lost_self": (0.0,)}, "lost mass 1"),
        ({"scheme": (2, -1, 0)}, "deletes -1"),
        ({"scheme": (2, 2, 2)}, "deletes 6 of 6"),
        ({"ratio": 1.5}, "outside"),
        ({"ratio": 0.0}, "outside"),
        ({"alpha": float("nan")}, "outside"),
        ({"lost_cross": (0.0, float("inf"), 0.0)}, "finite"),
        ({"max_prune_points": 1}, "at 2 layers"),
        ({"max_prune_points": 0}, "max_prune_points"),
        ({"samples": 0}, "below 1"),
        ({"schema_version": 2}, "version"),
        ({"max_prune_points": 2, "unconstrained": replace(FIT, scheme=(6, 0, 0))}, "deletes 6 of 6"),
    ],
)
def test_contradictions_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        recipe(**changes)


def spoiled(**changes):
    return json.dumps({**asdict(recipe()), **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (spoiled(scheme=[2, 2, 2]), "deletes 6 of 6"),
        (spoiled(scheme=[2, 1.5, 0]), r"scheme\[1\]"),
        (spoiled(scheme="2, 1, 0"), "scheme"),
        (spoiled(extra=1), "extra"),
        (spoiled(convention="F2"), "convention"),
        (spoiled(unconstrained={"scheme": [0]}), "unconstrained"),
        (spoiled(schema_version=2), "schema version 2"),
        (spoiled(method="fastv"), "not a recipe"),
        (json.dumps({k: v for k, v in asdict(recipe()).items() if k != "alpha"}), "alpha"),
        (spoiled().replace('"alpha": 0.25', '"alpha": NaN'), "outside"),
        ("{", "not JSON"),
        ("[]", "not a recipe"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_spoiled_file_is_refused_by_name(text, words, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=words) as raised:
        read_recipe(path)
    assert "recipe.json" in raised.value.what


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_recipe(path)


def test_an_earlier_recipe_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "recipe.json"
    write_recipe(recipe(), path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists") as raised:
        write_recipe(recipe(seed=1), path)
    assert "--force" in raised.value.hint
    assert path.read_bytes() == before
    write_recipe(recipe(seed=1), path, force=True)
    assert read_recipe(path).seed == 1
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.json"]


def test_force_replaces_nothing_but_recipes(tmp_path):
    path = tmp_path / "calibration.jsonl"
    path.write_text('{"image": "cat.png", "prompt": "What?"}\n')
    for place in (path, tmp_path, tmp_path / "nowhere" / "recipe.json"):
        with pytest.raises(UsageError):
            write_recipe(recipe(), place, force=True)
    assert "cat.png" in path.read_text()


def test_another_model_is_refused():
    own = recipe()
    own.check_model(weights_sha256="ab" * 32, num_layers=3, name="tiny")
    with pytest.raises(UsageError, match="3 layers of tiny, and other has 4") as raised:
        own.check_model(weights_sha256="ab" * 32, num_layers=4, name="other")
    assert raised.value.hint == "Fit one for this model: visprune fit MODEL --ratio 0.5"
    with pytest.raises(UsageError, match="fitted on other weights"):
        own.check_model(weights_sha256="cd" * 32, num_layers=3, name="other")


def test_an_adapter_on_one_side_alone():
    own = recipe()
    with pytest.raises(UsageError, match="than those of tiny with lora merged") as raised:
        own.check_model(weights_sha256="cd" * 32, num_layers=3, name="tiny", adapters=["lora"])
    assert raised.value.hint == "Fit one for this model: visprune fit MODEL --adapter lora --ratio 0.5"
    with pytest.raises(UsageError, match="other weights") as raised:
        own.check_model(weights_sha256="cd" * 32, num_layers=3, name="tiny")
    assert raised.value.hint.startswith("If it was fitted with an adapter, give that with --adapter")


def test_recipes_are_read_where_there_is_no_torch(tmp_path):
    write_recipe(recipe(), tmp_path / "recipe.json")
    code = (
        "import sys; from visprune.pruning.recipe import read_recipe; read_recipe(sys.argv[1]);"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
