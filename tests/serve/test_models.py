"""Names of the models."""

from __future__ import annotations

from pathlib import Path

import pytest

from visprune.errors import UsageError
from visprune.serve.models import model_ids


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["a/llava"], ["llava"]),
        (["a/llava", "b/llava", "c/llava"], ["llava", "llava-2", "llava-3"]),
        (["llava-2", "a/llava", "b/llava"], ["llava-2", "llava", "llava-3"]),
        (["a/llava", "b/llava", "llava-2"], ["llava", "llava-2", "llava-2-2"]),
        (["a/../llava/"], ["llava"]),
        (["/"], ["model"]),
        ([], []),
    ],
)
def test_names_are_those_of_the_directories_and_never_the_same(paths, ids):
    assert list(model_ids([Path(path) for path in paths])) == ids


def test_the_directory_of_a_relative_path_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "bundle").mkdir()
    monkeypatch.chdir(tmp_path / "bundle")
    assert model_ids([Path()]) == ("bundle",)


def test_the_same_directory_twice_is_refused(tmp_path):
    with pytest.raises(UsageError, match="given twice"):
        model_ids([tmp_path, tmp_path / "x" / ".."])
