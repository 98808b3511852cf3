"""Caches: where they are, and that an entry is written whole or not at all."""

from __future__ import annotations

import pytest

from visprune.caches import cache_dir, keep


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "visprune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "visprune"


def test_an_entry_is_kept_with_its_folder(tmp_path):
    entry = tmp_path / "engines" / "one.json"
    keep(entry, lambda path: path.write_text("whole"))
    assert entry.read_text() == "whole"
    assert list(entry.parent.iterdir()) == [entry]


def test_a_failed_entry_leaves_the_earlier_one(tmp_path):
    entry = tmp_path / "one.json"
    keep(entry, lambda path: path.write_text("first"))

    def fail(path):
        path.write_text("half")
        raise OSError("the disk is full")

    keep(entry, fail)
    assert entry.read_text() == "first"
    assert list(tmp_path.iterdir()) == [entry]


def test_an_error_of_the_writer_itself_is_not_hidden(tmp_path):
    with pytest.raises(ValueError, match="a bug"):
        keep(tmp_path / "one.json", lambda path: int("a bug"))
    assert not list(tmp_path.iterdir())
