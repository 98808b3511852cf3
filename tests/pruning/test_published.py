"""FitPrune's published recipes: their numbers against published sums, their names, and files of bundles."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from visprune.errors import BundleError, UsageError
from visprune.pruning.published import open_recipe, published_recipes
from visprune.pruning.recipe import CONVENTION, Recipe, read_recipe, write_recipe

RECIPES = published_recipes()
SIXTY = RECIPES["llava-1.5-7b-60"]

SUMS = {  # deleted, left, MAC in units of 10^12, true reduction in percent
    "llava-1.5-7b-20": (149, 427, 3.231, 15.35),
    "llava-1.5-7b-40": (336, 240, 2.334, 38.85),
    "llava-1.5-7b-60": (449, 127, 1.538, 59.70),
    "llava-1.5-7b-80": (514, 62, 0.775, 79.69),
}


def macs(scheme, tokens, hidden=4096, inner=11008):
    """3 n d^2 + 2 n^2 d before each deletion, n d^2 + 3 n d m after it."""
    total = 0
    for count in scheme:
        total += 3 * tokens * hidden**2 + 2 * tokens**2 * hidden
        tokens -= count
        total += tokens * hidden**2 + 3 * tokens * hidden * inner
    return total


def fitted():
    return Recipe(
        schema_version=1,
        method="fitprune",
        model="tiny",
        weights_sha256="ab" * 32,
        num_layers=2,
        hidden_size=8,
        intermediate_size=16,
        visual_tokens=6,
        scheme=(2, 0),
        alpha=0.25,
        convention=CONVENTION,
        ratio=0.5,
        ratio_on_samples=0.49,
        ratio_reached=0.6,
        samples=4,
        seed=0,
        max_prune_points=None,
        lost_self=(0.1, 0.2),
        lost_cross=(0.1, 0.2),
    )


def test_which_recipes_there_are():
    names = [f"llava-1.5-7b-{percent}" for percent in (10, 20, 30, 40, 50, 55, 60, 70, 80, 90)]
    names += [f"{model}-{percent}" for model in ("llava-hr-7b", "llava-next-7b") for percent in (40, 60)]
    assert list(RECIPES) == names
    tokens = {"LLaVA-1.5-7B": 576, "LLaVA-HR-7B": 1024, "LLaVA-NeXT-7B": 2880}
    for name, recipe in RECIPES.items():
        assert recipe.published == name
        assert recipe.visual_tokens == tokens[recipe.model]
        assert f"{recipe.model.lower()}-{round(100 * recipe.nominal_reduction)}" == name
        assert (len(recipe.scheme), recipe.num_layers, recipe.scheme[-1]) == (32, 32, 0)
        assert "2409.10197" in recipe.source


@pytest.mark.parametrize("name", SUMS)
def test_the_numbers_have_the_published_sums(name):
    recipe = RECIPES[name]
    deleted, left, work, reduction = SUMS[name]
    assert (sum(recipe.scheme), recipe.visual_tokens - sum(recipe.scheme)) == (deleted, left)
    assert macs(recipe.scheme, recipe.visual_tokens) / 1e12 == pytest.approx(work, abs=5e-4)
    assert 100 * recipe.true_reduction == pytest.approx(reduction, abs=5e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_true_reduction_and_which_recipes_miss_their_name(name):
    recipe = RECIPES[name]
    whole = macs([0] * 32, recipe.visual_tokens)
    true = 1 - macs(recipe.scheme, recipe.visual_tokens) / whole
    assert recipe.true_reduction == pytest.approx(true, abs=1e-12)
    assert recipe.pruner().work == pytest.approx(1 - true, abs=1e-12)
    short = name in ("llava-1.5-7b-10", "llava-1.5-7b-20", "llava-1.5-7b-30")
    assert (recipe.nominal_reduction - true > 0.02) == short
    assert (recipe.shortfall is not None) == short
    if short:
        assert f"removes {100 * true:.1f}% of the visual work" in recipe.shortfall
        assert f"not the {name[-2:]}% of its name" in recipe.shortfall


def test_a_recipe_by_its_name(tmp_path, monkeypatch):
    assert open_recipe("published:llava-1.5-7b-60") is SIXTY
    pruner = SIXTY.pruner()
    assert (pruner.scheme, pruner.visual_tokens) == (SIXTY.scheme, 576)
    assert (pruner.recipe, pruner.source) == ("published:llava-1.5-7b-60", SIXTY.source)

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "published:llava-1.5-7b-60"
    write_recipe(fitted(), file)
    assert open_recipe(file.name) is SIXTY
    assert open_recipe(file) == read_recipe(file) == fitted()


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        ("published:", "published: names no recipe.", "Write published:NAME; `visprune methods --recipes`"),
        ("published:llava-1.5-7b-65", "no published recipe 'llava-1.5-7b-65'", "Did you mean 'llava-1.5-7b-"),
        ("published:LLaVA-NeXT-7B-60", "no published recipe", "Did you mean 'llava-next-7b-60'?"),
        ("published:zzz", "no published recipe 'zzz'", ", ".join(RECIPES)),
        ("published: ", "no published recipe ' '", ", ".join(RECIPES)),
        ("published:../recipe.json", "no published recipe '../recipe.json'", "llava-next-7b-60"),
        ("llava-1.5-7b-60", "no file llava-1.5-7b-60", "Write published:llava-1.5-7b-60 for"),
        ("llava-1.5-7b-65", "llava-1.5-7b-65 cannot be read", "`visprune fit` wrote"),
    ],
)
def test_a_name_that_is_none(given, what, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        open_recipe(given)
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_the_file_of_a_bundle_is_read_again(tmp_path):
    for recipe in RECIPES.values():
        path = tmp_path / "recipe.json"
        path.write_text(recipe.to_json())
        assert open_recipe(path) == recipe
    data = json.loads(SIXTY.to_json())
    assert (data["published"], data["model"], data["source"]) == (
        "llava-1.5-7b-60",
        "LLaVA-1.5-7B",
        SIXTY.source,
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"scheme": [1, *SIXTY.scheme[1:]]}, "says that it is the published recipe llava-1.5-7b-60"),
        ({"published": "llava-1.5-7b-50"}, "says that it is the published recipe llava-1.5-7b-50"),
        ({"published": "mine"}, "says that it is the published recipe mine"),
        ({"model": "another"}, "and it is not"),
        ({"scheme": [1, 2]}, "has 2 counts for 32 layers"),
        ({"scheme": [-1, *SIXTY.scheme[1:]]}, "one below 0"),
        ({"scheme": []}, "has 0 counts"),
        ({"scheme": [576, *SIXTY.scheme[1:]]}, "of 576 visual tokens"),
        ({"scheme": "many"}, "scheme should be"),
        ({"alpha": 0.5}, "unknown field 'alpha'"),
        ({"schema_version": 2}, "has schema version 2"),
        ({"method": "fastv"}, "is not a recipe"),
    ],
)
def test_a_file_that_only_says_that_it_is_published(changes, what, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(json.loads(SIXTY.to_json()) | changes))
    with pytest.raises(BundleError) as caught:
        open_recipe(path)
    assert what in caught.value.what
    assert "recipe.json" in caught.value.what


def test_a_decoder_of_another_depth():
    SIXTY.check_layers(32, "llava-hf/llava-1.5-7b-hf")
    with pytest.raises(UsageError, match=r"32 layers of LLaVA-1\.5-7B, and big has 40") as caught:
        SIXTY.check_layers(40, "big")
    assert caught.value.hint == "Fit one for this model: visprune fit MODEL --ratio 0.4"


def test_what_a_user_is_told():
    said = SIXTY.note("my-model", 576)
    assert "published:llava-1.5-7b-60 was fitted on LLaVA-1.5-7B by the authors of FitPrune" in said
    assert "Whether my-model has the same weights cannot be known" in said
    assert "scaled" not in said
    assert "are for 576 visual tokens and are scaled to the 144 that enter" in SIXTY.note("my-model", 144)
    assert "scaled to those of each prompt" in SIXTY.note("my-model", None)
    assert (
        RECIPES["llava-1.5-7b-10"]
        .note("m", 576)
        .endswith("It removes 6.4% of the visual work, and not the 10% of its name.")
    )


def test_a_scheme_is_checked_when_a_record_is_made():
    with pytest.raises(UsageError, match="has 31 counts for 32 layers"):
        replace(SIXTY, scheme=SIXTY.scheme[1:])


def test_no_torch_is_needed():
    code = (
        "import sys; from visprune.pruning.published import open_recipe; open_recipe(sys.argv[1]);"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    )
    command = [sys.executable, "-c", code, "published:llava-hr-7b-40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
