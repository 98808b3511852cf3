"""Optional imports: a missing package is named with its extra, and any other error is passed on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from visprune.errors import MissingExtraError
from visprune.optional import have, require


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a folder on the import path, and return a function that makes a package in it."""

    def make(name: str, content: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(content)

    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield make
    for name in set(sys.modules) - before:
        if name.startswith("vp_"):
            del sys.modules[name]


def test_what_is_there_is_imported():
    assert require("json.decoder", extra="cpu") is sys.modules["json.decoder"]


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(MissingExtraError) as caught:
        require("vp_absent.part", extra="gpu")
    assert "'vp_absent'" in caught.value.what
    assert 'pip install "visprune[gpu]"' in caught.value.hint


def test_a_package_that_misses_something_else_is_not_called_missing(packages):
    packages("vp_needy", "import vp_not_there")
    with pytest.raises(ModuleNotFoundError, match="vp_not_there"):
        require("vp_needy", extra="cpu")


def test_a_package_that_misses_a_part_of_itself_is_not_called_missing(packages):
    packages("vp_broken", "from vp_broken._native import run")
    with pytest.raises(ModuleNotFoundError, match=r"vp_broken\._native"):
        require("vp_broken", extra="cpu")


def test_a_package_that_fails_while_loading_is_not_called_missing(packages):
    packages("vp_library", "raise ImportError('libcudart.so.12: cannot open shared object file')")
    with pytest.raises(ImportError, match="libcudart") as caught:
        require("vp_library", extra="gpu")
    assert not isinstance(caught.value, ModuleNotFoundError)


def test_have_looks_without_importing(packages):
    packages("vp_silent", "raise RuntimeError('imported')")
    assert have("vp_silent")
    assert "vp_silent" not in sys.modules


@pytest.mark.parametrize("name", ["vp_absent", "vp_absent.part.of.it"])
def test_have_answers_no_for_what_is_missing(name):
    assert not have(name)


def test_have_answers_no_for_a_blocked_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "vp_blocked", None)
    assert not have("vp_blocked")
