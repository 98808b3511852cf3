"""Look-up by name: the entry, the nearest name, or the list."""

from __future__ import annotations

import pytest

from visprune.errors import UsageError
from visprune.names import lookup, nearest

TABLE = {"fopru-row": 1, "fopru-rank": 2, "none": 3}


def test_a_known_name_gives_its_entry():
    assert lookup("none", TABLE, "method") == 3


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("FOPRU-ROW", "Did you mean 'fopru-row'?"),
        ("nome", "Did you mean 'none'?"),
        ("zzz", "Use one of: fopru-row, fopru-rank, none."),
        ("", "Use one of: fopru-row, fopru-rank, none."),
    ],
)
def test_an_unknown_name_gets_the_nearest_or_the_list(typed, hint):
    with pytest.raises(UsageError) as caught:
        lookup(typed, TABLE, "method")
    assert caught.value.what == f"There is no method {typed!r}."
    assert caught.value.hint == hint


def test_nearest_takes_any_names():
    assert nearest("orin-nx-16g", iter(["orin-nx-8gb", "orin-nx-16gb"])) == "orin-nx-16gb"
    assert nearest("quantum", ["orin-nx-8gb"]) is None
