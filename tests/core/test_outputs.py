"""Result files: refused before the work, written whole."""

from __future__ import annotations

import os

import pytest

from visprune.errors import UsageError
from visprune.outputs import check_file, lock, write_file


def test_a_free_path_is_accepted_and_left_as_it_is(tmp_path):
    check_file(tmp_path / "report.json", force=False)
    assert not list(tmp_path.iterdir())


def test_an_earlier_file_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("earlier")
    with pytest.raises(UsageError, match="exists") as caught:
        check_file(path, force=False)
    assert "--force" in caught.value.hint
    check_file(path, force=True)
    assert path.read_text() == "earlier"


@pytest.mark.parametrize(("name", "what"), [("", "is a directory"), ("nowhere/report.json", "no directory")])
def test_a_path_that_no_file_can_have_is_refused_even_with_force(name, what, tmp_path):
    with pytest.raises(UsageError, match=what):
        check_file(tmp_path / name, force=True)


def test_a_file_replaces_the_earlier_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("earlier")
    write_file(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_locked_until_it_is_closed(tmp_path):
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    lock(first, tmp_path)
    with pytest.raises(UsageError, match="Another run is writing"):
        lock(second, tmp_path)
    os.close(first)
    lock(second, tmp_path)
    os.close(second)
