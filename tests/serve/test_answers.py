"""What the list of models says of a bundle."""

from __future__ import annotations

from dataclasses import replace

import pytest

from visprune.budget import Budget, LayerBudget
from visprune.bundle import Bundle
from visprune.manifest import LayerPruning
from visprune.serve.answers import card


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (LayerBudget(1, 0.5), 8),
        (LayerBudget(2, 0.25), 4),
        (LayerBudget(1, 0.3, deletions=(24,), recipe_tokens=32), 4),  # a recipe for twice as many tokens
    ],
)
def test_a_bundle_that_prunes_inside_the_llm_tells_what_is_left_there(tiny_bundle, budget, kept):
    manifest = Bundle.open(tiny_bundle).manifest
    before = replace(manifest.pruning, method="none", keep_tokens=16, budget=Budget(16, prunable=False))
    inside = LayerPruning("fastv", {}, tuple(range(budget.points)), "attention", "original", budget)
    told = card("m", replace(manifest, pruning=before, layer_pruning=inside), 0, needs_auth=False).visprune
    assert (told.visual_tokens, told.keep_tokens, told.ratio) == (16, kept, kept / 16)
    assert (told.method, told.inside_llm) == ("none", "fastv")


def test_a_bundle_that_prunes_before_the_llm_tells_what_enters_it(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    inside = LayerPruning("fastv", {}, (0,), "attention", "original", LayerBudget(1, 0.5))
    for found in (manifest, replace(manifest, layer_pruning=inside)):
        told = card("m", found, 0, needs_auth=True).visprune
        assert told.keep_tokens == found.pruning.keep_tokens
        assert told.ratio == round(told.keep_tokens / told.visual_tokens, 6)
