"""Scores of single answers, against the definitions written out."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from visprune.errors import UsageError
from visprune.evaluation.metrics import METRICS, exact_match, metric_named, vqa_accuracy
from visprune.evaluation.questions import Question


def question(*answers, choices=()):
    return Question("1", "Line 1", Path("a.png"), "What?", answers, choices)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" Red.\n", True),
        ("red", True),
        ("cherry", True),
        ("red and more", False),
        ("a red", False),
        ("", False),
    ],
)
def test_an_exact_match_is_one_of_the_answers_and_nothing_more(text, right):
    assert exact_match(text, ["Red", "cherry"]) is right


@pytest.mark.parametrize("people", [4, 10])
def test_vqa_accuracy_is_the_mean_over_all_people_but_one(people):
    for same in range(people + 1):
        answers = ["cat"] * same + ["dog"] * (people - same)
        subsets = itertools.combinations(answers, people - 1)
        by_definition = np.mean([min(list(subset).count("cat") / 3, 1) for subset in subsets])
        assert vqa_accuracy("cat", answers) == pytest.approx(by_definition, abs=1e-12)


def test_the_published_values_for_ten_people():
    found = [vqa_accuracy("cat", ["cat"] * same + ["dog"] * (10 - same)) for same in range(5)]
    assert found == pytest.approx([0, 0.3, 0.6, 0.9, 1])


@pytest.mark.parametrize(
    ("metric", "asked", "text", "score", "said"),
    [
        ("exact", question("Cat", "kitten"), "cat.", 1, "cat"),
        ("exact", question("Cat"), "a cat", 0, "a cat"),
        ("vqa", question(*["two"] * 3, *["3"] * 7), "2", 0.9, "2"),
        ("yes-no", question("no"), "There is not.", 1, "no"),
        ("yes-no", question("no"), "I see it", 0, "yes"),
        ("choice", question("B", choices=("x", "y")), "B.", 1, "B"),
        ("choice", question("B", choices=("x", "y")), "Who knows", 0, "who knows"),
    ],
)
def test_judgement(metric, asked, text, score, said):
    found = METRICS[metric].judge(asked, text)
    assert (found.score, found.said) == (pytest.approx(score), said)


@pytest.mark.parametrize(
    ("metric", "asked", "why"),
    [
        ("vqa", question("a", "b", "c"), "at least 4 people, and there are 3"),
        ("yes-no", question("maybe"), "'maybe', not yes or no"),
        ("choice", question("A"), "no choices"),
    ],
)
def test_what_a_metric_cannot_judge(metric, asked, why):
    problem = METRICS[metric].problem(asked)
    assert problem.startswith("Line 1: ")
    assert why in problem


def test_a_metric_that_is_none():
    with pytest.raises(UsageError, match="Did you mean 'exact'"):
        metric_named("exakt")
