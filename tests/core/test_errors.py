"""Errors have two sentences, and behave like other exceptions."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from visprune import errors
from visprune.errors import VispruneError

ALL = [getattr(errors, name) for name in errors.__all__]


def test_every_class_of_the_module_is_public_and_below_the_base():
    defined = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)
    assert all(issubclass(kind, VispruneError) for kind in ALL)


def test_the_tree_at_the_top_of_the_file_is_the_tree():
    drawn = [
        line.strip("│├└─ ").split()[0] for line in (errors.__doc__ or "").splitlines() if "Error" in line
    ]
    assert sorted(drawn) == sorted(errors.__all__)


@pytest.mark.parametrize("kind", ALL)
def test_an_error_keeps_both_sentences(kind):
    error = kind("It broke.", "Mend it.")
    assert (error.what, error.hint, str(error)) == ("It broke.", "Mend it.", "It broke. Mend it.")


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_pickling_and_copying(kind):
    for again in (
        pickle.loads(pickle.dumps(kind("It broke.", "Mend it."))),
        copy.copy(kind("It broke.", "Mend it.")),
    ):
        assert type(again) is kind
        assert str(again) == "It broke. Mend it."


def test_an_error_needs_a_hint():
    with pytest.raises(TypeError):
        VispruneError("It broke.")  # type: ignore[call-arg]
