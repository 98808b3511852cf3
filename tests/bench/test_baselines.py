"""Rows of random tokens and of a smaller picture: their true counts, and none of them twice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("onnxruntime")

from visprune.bench.baselines import add_baselines, baseline_pairs
from visprune.bench.entries import LineUp
from visprune.bench.evaluation_rows import baseline_rows, made_baselines
from visprune.bench.lineup import given_entry
from visprune.budget import Budget
from visprune.bundle import Bundle
from visprune.errors import CheckpointError
from visprune.evaluation.answering import Candidate

SQUARES = Budget(16, unit="square")


def altered(bundle, method, budget=None, **changes):
    """The bundle as one of another method, in its manifest alone."""
    pruning = bundle.manifest.pruning
    pruning = replace(pruning, method=method, budget=budget or pruning.budget, **changes)
    return Bundle(bundle.path, replace(bundle.manifest, pruning=pruning))


def maker(made):
    def make(bundle, method):
        made.append(method)
        return altered(bundle, method, SQUARES if method == "resize" else Budget(16), keep_tokens=16)

    return make


def no_maker(bundle, method):
    raise CheckpointError("There is no checkpoint.", "Find it.")


@pytest.fixture
def tiny(tiny_bundle):
    return Bundle.open(tiny_bundle)


def rows(found):
    return [(one.contender.name, one.contender.role, one.keep.tokens) for one in found.entries]


def test_a_count_is_the_largest_that_is_not_above():
    for count in range(1, 577):
        assert Budget(576).at_most(count) == count
        assert Budget(576, unit="square").at_most(count) == math.isqrt(count) ** 2
    assert Budget(576, unit="row", unit_tokens=24).at_most(71) == 48


def test_rows_have_their_true_counts_and_one_bundle_for_all(tiny):
    made = []
    found = LineUp(
        [given_entry(f"at {count}", tiny, keep_tokens=count) for count in (15, 12, 4)]
        + [given_entry("whole", tiny, keep_tokens=16)]
    )
    assert add_baselines(found, list(found.entries), maker(made)) == []
    assert made == ["random", "resize"]
    assert rows(found)[4:] == [
        ("random 15 of 16, fp32", "random", 15),
        ("random 12 of 16, fp32", "random", 12),
        ("random 4 of 16, fp32", "random", 4),
        ("resize 9 of 16, fp32", "resize", 9),
        ("resize 4 of 16, fp32", "resize", 4),
    ]
    assert baseline_pairs(found.entries) == [(0, 4), (0, 7), (1, 5), (1, 7), (2, 6), (2, 8)]
    assert [note.count("of 16") for note in found.notes] == [3, 2]


def test_baselines_that_are_given_are_not_made_or_added_again(tiny):
    mine = [altered(tiny, "random", Budget(16)), altered(tiny, "resize", SQUARES)]
    found = LineUp(
        [
            given_entry("pruned", tiny, keep_tokens=15),
            given_entry("drawn", mine[0], keep_tokens=15),
            given_entry("small", mine[1], keep_tokens=4),
        ]
    )
    assert add_baselines(found, list(found.entries), no_maker) == []
    assert rows(found)[3:] == [("resize 9 of 16, fp32", "resize", 9)]
    assert baseline_pairs(found.entries) == [(0, 1), (0, 3)]
    assert found.notes == []
    alone = LineUp([given_entry("drawn", mine[0], keep_tokens=5)])
    assert add_baselines(alone, list(alone.entries), no_maker) == []
    assert len(alone.entries) == 1


def test_a_row_of_another_precision_or_model_is_no_baseline(tiny):
    other = Bundle(tiny.path, replace(tiny.manifest, dtype="float16"))
    entries = [given_entry("pruned", tiny), given_entry("drawn", altered(other, "random", Budget(16)))]
    assert baseline_pairs(entries) == []


@pytest.mark.parametrize("ray", [False, True])
def test_missing_rows_of_an_evaluation_are_told_with_their_commands(tiny, tmp_path, monkeypatch, ray):
    monkeypatch.chdir(tmp_path)
    with made_baselines("cpu", lambda *_: None, ray=ray) as baselines:
        added = baselines([Candidate(tiny.path, keep_tokens=15)], [tiny])
    assert (added.candidates, added.pairs) == ((), ())
    (note,) = added.notes
    assert note.startswith("not in the table: random, 15 of 16; resize, at most 15 of 16. ")
    assert ("Ray cluster" if ray else "is not in the working directory") in note
    for method in ("random", "resize"):
        assert f"visprune-export MODEL --method {method} -o {method}" in note


def test_added_candidates_name_their_rows(tiny):
    candidates = [Candidate(tiny.path, keep_tokens=15), Candidate(tiny.path, ratio=1.0)]
    added = baseline_rows(candidates, [tiny, tiny], maker([]))
    assert [(one.name, one.keep_tokens) for one in added.candidates] == [
        ("random 15 of 16, fp32", 15),
        ("resize 9 of 16, fp32", 9),
    ]
    assert added.pairs == ((0, 2), (0, 3))
