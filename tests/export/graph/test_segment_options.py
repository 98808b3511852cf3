"""What cannot be asked of segments and of pruning inside the LLM: two sentences, and nothing on disk."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from visprune.budget import LayerBudget
from visprune.cli import run_command
from visprune.errors import UnsupportedError, UsageError
from visprune.export import export
from visprune.pruning.fastv import FastV
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.pyramiddrop import PyramidDrop
from visprune.pruning.random_draw import Random
from visprune.pruning.sparsevlm import SparseVLM


@pytest.fixture(scope="module")
def model(checkpoint):
    """Four layers, 16 visual tokens."""
    return checkpoint(checkpoint.Tiny(layers=4))


@pytest.fixture
def refused(tmp_path):
    def check(kind, what, model, hint="", **options):
        with pytest.raises(kind, match=what) as caught:
            export(model, output=tmp_path / "made" / "here", **options)
        for sentence in (caught.value.what, caught.value.hint):
            assert sentence.endswith((".", "?"))
            assert "\n" not in sentence
        assert hint in caught.value.hint
        assert not list(tmp_path.iterdir())

    return check


@pytest.mark.parametrize("segments", [0, -1, 5, 10**9])
def test_segments_that_cannot_be(refused, model, segments):
    refused(UsageError, f"into {segments} segments", model, "from 1 to 4", method="none", segments=segments)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fastv"},
        {"method": "pyramiddrop", "ratio": 0.5},
        {"method": "sparsevlm"},
        {"method": "fopru-rank", "ratio": 0.5, "then": "fastv"},
        {"method": FitPrune((1, 0, 0, 0), 16, 0.9)},
    ],
)
@pytest.mark.parametrize("segments", [1, 2])
def test_segments_where_a_method_cuts(refused, model, options, segments):
    refused(UsageError, "decides itself where", model, "--segments", segments=segments, **options)


@pytest.mark.parametrize("then", ["random", "random:0.5", "none", Random(3)])
def test_two_methods_before_the_llm(refused, model, then):
    refused(
        UsageError, "two methods of one place", model, "--then", method="fopru-rank", ratio=0.5, then=then
    )


@pytest.mark.parametrize("then", ["pyramiddrop", "fastv:0.5", "random", PyramidDrop()])
def test_two_methods_inside_the_llm(refused, model, then):
    refused(UsageError, "fastv prunes inside the LLM", model, "--method", method="fastv", then=then)
    refused(UsageError, "prunes inside the LLM", model, "--method", method=FastV(), then=then)


@pytest.mark.parametrize(
    ("then", "what"),
    [
        ("fastv:x", "--then fastv:x has no ratio"),
        ("fastv:", "--then fastv: has no ratio"),
        ("fastv:0.5:0.5", "has no ratio"),
        ("fastv:0,5", "has no ratio"),
        ("fastv:1.5", r"outside \(0, 1\]"),
        ("fastv:0", "outside"),
        ("fastv:-0.5", "outside"),
        ("fastv:nan", "outside"),
        ("fastv:inf", "outside"),
        ("fastw:0.5", "no pruning method 'fastw'"),
        (":0.5", "no pruning method ''"),
        ("", "no pruning method ''"),
    ],
)
def test_a_second_method_that_is_none(refused, model, then, what):
    refused(UsageError, what, model, method="fopru-rank", ratio=0.5, then=then)


def test_a_scheme_for_another_decoder(refused, model):
    for scheme in ((1, 1, 1), (1, 1, 1, 1, 1)):
        refused(
            UnsupportedError,
            f"recipe has {len(scheme)} layers, and the decoder has 4",
            model,
            "visprune fit",
            method=FitPrune(scheme, 16, 0.5),
        )


def test_a_scheme_that_deletes_nothing_that_matters(refused, model):
    for scheme in ((0, 0, 0, 0), (0, 0, 0, 5)):
        refused(UnsupportedError, "deletes nothing before the last", model, method=FitPrune(scheme, 16, 1.0))


@pytest.mark.parametrize("scheme", [(8, 8, 0, 0), (0, 0, 0, 16), (17, 0, 0, 0), (-1, 2, 0, 0)])
def test_a_scheme_that_deletes_more_than_is_left(scheme):
    with pytest.raises(UsageError, match="of 16 visual tokens") as caught:
        FitPrune(scheme, 16, 0.5)
    assert "leave one token" in caught.value.hint
    with pytest.raises(UsageError, match="one at least must be left"):
        LayerBudget(1, 0.5, deletions=(16,), recipe_tokens=16)


@pytest.mark.parametrize("work", [0.0, 1.5, float("nan")])
def test_a_scheme_for_a_share_of_work_that_cannot_be(refused, model, work):
    refused(UsageError, "outside", model, method=FitPrune((4, 0, 0, 0), 16, work))


@pytest.mark.parametrize("name", ["recipe", "calibration", "max_prune_points"])
@pytest.mark.parametrize(
    "options", [{"method": "fastv"}, {"method": "none"}, {"method": "random", "then": "fastv"}]
)
def test_options_of_fitprune_with_another_method(refused, model, name, options, tmp_path):
    value = 3 if name == "max_prune_points" else tmp_path / "file"
    option = {"calibration": "--data"}.get(name, "--" + name.replace("_", "-"))
    refused(UsageError, f"{option} belongs to fitprune", model, option, **options, **{name: value})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "fitprune"}, "needs a recipe, or a ratio"),
        ({"method": "uniform", "ratio": 0.5, "then": "fitprune"}, "needs a recipe, or a ratio"),
        ({"method": "fitprune", "keep_tokens": 4}, "another number of visual tokens at each layer"),
        ({"method": FitPrune((4, 0, 0, 0), 16, 0.5), "keep_tokens": 4}, "another number"),
        ({"method": FitPrune((4, 0, 0, 0), 16, 0.5), "ratio": 0.5}, "fitted already, so --ratio"),
        ({"method": FitPrune((4, 0, 0, 0), 16, 0.5), "max_prune_points": 1}, "so --max-prune-points"),
        ({"method": FitPrune((4, 0, 0, 0), 16, 0.5), "recipe": "x.json"}, "so --recipe cannot"),
        ({"method": "fitprune", "recipe": "x.json", "ratio": 0.5}, "so --ratio cannot"),
        ({"method": "fitprune", "recipe": "x.json", "calibration": "y"}, "so --data cannot"),
        ({"method": "fitprune", "recipe": "x.json"}, "x.json cannot be read"),
        ({"method": "fitprune", "recipe": "published:x"}, "no published recipe 'x'"),
        ({"method": "fitprune", "recipe": "published:"}, "published: names no recipe"),
        ({"method": "fitprune", "ratio": 0.5, "max_prune_points": 0}, "0 prune points"),
        ({"method": "fitprune", "ratio": 1.5}, "outside"),
    ],
)
def test_fitprune_takes_its_scheme_from_one_place(refused, model, options, what):
    refused(UsageError, what, model, **options)


@pytest.mark.parametrize("recipe", ["published:llava-1.5-7b-60", "x.json"])
@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"max_prune_points": 3}, "--max-prune-points"),
        ({"ratio": 0.5}, "--ratio"),
        ({"calibration": "x.jsonl"}, "--data"),
        ({"method": "uniform", "then": "fitprune:0.5"}, "the ratio of --then"),
    ],
)
def test_a_recipe_that_exists_is_not_fitted_again(refused, model, recipe, options, option):
    hint = f"Leave {option} out, or fit another recipe: visprune fit MODEL --ratio R --max-prune-points G."
    options = {"method": "fitprune", "recipe": recipe} | options
    refused(UsageError, f"is fitted already, so {option} cannot change it", model, hint, **options)


@pytest.mark.parametrize(
    "options", [{"method": "fastv"}, {"method": "pyramiddrop"}, {"method": "none", "segments": 2}]
)
@pytest.mark.parametrize("text", ["GemmaConfig", "Phi3Config"])
def test_a_decoder_that_cannot_be_cut(refused, checkpoint, options, text):
    head_dim = 16 if text == "GemmaConfig" else None
    path = checkpoint(checkpoint.Tiny(layers=4, text=text, head_dim=head_dim))
    refused(UnsupportedError, "cannot be cut into segments", path, "llama, mistral, qwen2", **options)


def test_a_decoder_with_too_few_layers(refused, checkpoint):
    two, one = (checkpoint(checkpoint.Tiny(layers=layers)) for layers in (2, 1))
    refused(UnsupportedError, "before layer 2 of a decoder of 2", two, "first_pruned_layer", method="fastv")
    refused(UnsupportedError, "before layer 9 of", two, method=FastV(9))
    refused(UnsupportedError, "no 4 stages", one, method="pyramiddrop")
    refused(UnsupportedError, "all the last layer", one, "smaller stages", method="sparsevlm")
    refused(UnsupportedError, r"\(31,\) are all the last layer", two, method=SparseVLM((31,)))


def test_knobs_that_prune_nothing():
    with pytest.raises(UsageError, match="before layer 0"):
        FastV(0)
    with pytest.raises(UsageError, match="drops nothing"):
        PyramidDrop(1)
    for stages in ((), (2, 32), (-1, 6)):
        with pytest.raises(UsageError, match="cannot prune at the stages") as caught:
            SparseVLM(stages)
        assert "from 0 to 31" in caught.value.hint


@pytest.mark.parametrize("count", [0, -1, 17])
def test_counts_inside_the_llm_that_cannot_be(refused, model, count):
    refused(
        UsageError, f"Cannot keep {count} of 16", model, "from 1 to 16", method="fastv", keep_tokens=count
    )


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["--method", "none", "--segments", "9"], "into 9 segments", "from 1 to 4"),
        (["--method", "none", "--segments", "0"], "into 0 segments", "from 1 to 4"),
        (["--method", "fastv", "--segments", "2"], "where the decoder is cut", "--segments"),
        (["--method", "fastv", "--then", "pyramiddrop"], "inside the LLM", "--then"),
        (["--method", "fopru-rank", "--then", "random"], "one place", "--then"),
        (["--method", "fopru-rank", "--then", "fastv:x"], "has no ratio", "fastv:0.5"),
        (["--method", "fitprune"], "needs a recipe", "--ratio R"),
        (["--method", "fastv", "--recipe", "x.json"], "belongs to fitprune", "--recipe"),
        (["--method", "fastv", "--data", "x.jsonl"], "belongs to fitprune", "--data"),
    ],
)
def test_the_command_says_the_same(model, tmp_path, capsys, monkeypatch, arguments, what, hint):
    monkeypatch.chdir(tmp_path)
    assert run_command("export", [str(model), *arguments]) == 2
    printed = capsys.readouterr()
    error, advice = printed.err.splitlines()[-2:]
    assert printed.out == ""
    assert error.startswith("error: ")
    assert what in error
    assert hint in advice
    assert not list(tmp_path.iterdir())


def test_the_default_name_says_both_methods(model, tmp_path, monkeypatch):
    """One export without its check, for the name and for what the manifest keeps of what was asked."""
    monkeypatch.chdir(tmp_path)
    bundle = export(model, method="uniform", ratio=0.5, then="fastv:0.25", verify=False)
    assert bundle.path.name == f"{model.name}-uniform-keep8-fastv-0.25"
    data = json.loads((bundle.path / "visprune.json").read_text())
    assert data["pruning"]["keep_tokens"] == 8
    inside = data["layer_pruning"]
    assert (inside["method"], inside["layers"], inside["boundary"]) == ("fastv", [1], "attention")
    assert inside["options"] == {"first_pruned_layer": 2}
    assert inside["budget"]["ratio"] == 0.25
