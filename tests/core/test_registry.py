"""Methods by name: the literal table, a stranger's package, and names that are nearly right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from visprune import registry
from visprune.errors import UnsupportedError, UsageError
from visprune.pruning.base import Layout, VisionPruner
from visprune.registry import BUILTIN, load_method, method_names

STRANGER = """
from dataclasses import dataclass
from typing import ClassVar
from visprune.budget import Budget

@dataclass(frozen=True, slots=True)
class FirstTokens:
    place: ClassVar[str] = "before the LLM"
    paper: ClassVar[str] = "none"
    positions: ClassVar[str] = "contiguous"

    @property
    def signals(self):
        return ()

    def budget(self, layout):
        return Budget(layout.visual_tokens)

    def constants(self, layout):
        return {}

    def select(self, features, signals, keep_tokens, layout):
        import torch
        return torch.arange(keep_tokens).unsqueeze(0).expand(features.shape[0], -1)
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package with entry points, as pip would leave it."""

    def install(entry_points: str) -> None:
        (tmp_path / "vp_stranger.py").write_text(STRANGER)
        info = tmp_path / "vp_stranger-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vp-stranger\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entry_points}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    sys.modules.pop("vp_stranger", None)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_built_in_method_keeps_the_protocol(name):
    method = load_method(name)()
    assert isinstance(method, VisionPruner)
    assert method.budget(Layout(144, (12, 12))).from_ratio(1.0) == 144
    assert method.positions == "contiguous"


def test_the_table_is_sorted_and_complete():
    assert list(BUILTIN) == sorted(BUILTIN)
    assert set(BUILTIN) <= set(method_names())
    assert method_names() == sorted(method_names())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("fopru", "fopru-r"),  # row or rank
        ("fopru_row", "fopru-row"),
        ("FOPRU-ROW", "fopru-row"),
        ("randon", "random"),
        ("None", "none"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(typed, meant):
    with pytest.raises(UsageError, match=f"no pruning method '{typed}'") as caught:
        load_method(typed)
    assert caught.value.hint.startswith(f"Did you mean '{meant}")


@pytest.mark.parametrize("typed", ["", "zzz", "../../etc/passwd", "os:system"])
def test_a_name_that_is_like_none_gets_the_list(typed):
    with pytest.raises(UsageError) as caught:
        load_method(typed)
    assert all(name in caught.value.hint for name in BUILTIN)


def test_a_package_of_somebody_else_adds_a_method(stranger):
    stranger("first-tokens = vp_stranger:FirstTokens")
    assert "first-tokens" in method_names()
    method = load_method("first-tokens")()
    assert isinstance(method, VisionPruner)
    assert method.budget(Layout(16, (4, 4))).from_ratio(0.5) == 8
    with pytest.raises(UsageError) as caught:
        load_method("first-token")
    assert caught.value.hint == "Did you mean 'first-tokens'?"


def test_a_built_in_name_cannot_be_taken_over(stranger):
    stranger("fopru-row = vp_stranger:FirstTokens")
    assert load_method("fopru-row").__name__ == "FoPruRow"
    assert method_names().count("fopru-row") == 1


@pytest.mark.parametrize("target", ["vp_stranger:Absent", "vp_nowhere:FirstTokens"])
def test_a_broken_package_of_somebody_else_is_named(stranger, target):
    stranger(f"broken = {target}")
    assert "broken" in method_names()
    with pytest.raises(UnsupportedError) as caught:
        load_method("broken")
    assert f"'broken' of another package ({target}) cannot be loaded" in caught.value.what
