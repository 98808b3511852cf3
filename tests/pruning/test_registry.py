"""Methods by name: the table, methods of another package, and misspelt names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from visprune.errors import UnsupportedError, UsageError
from visprune.pruning import registry
from visprune.pruning.base import LayerPruner, Layout, RatingPruner, VisionPruner
from visprune.pruning.registry import BUILTIN, load_method, method_name, method_names

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
    assert isinstance(method, VisionPruner) != isinstance(method, LayerPruner)
    if isinstance(method, VisionPruner):
        assert method.place == ("before the encoder" if name == "resize" else "before the LLM")
        assert method.budget(Layout(144, (12, 12))).from_ratio(1.0) == 144
        assert method.positions == "contiguous"
    else:
        assert method.place == "inside the LLM"
        assert method.positions in ("original", "renumbered")
        assert (method.rows, method.heads) in (("last", "mean"), ("all", "max"), ("raters", "mean"))
        assert isinstance(method, RatingPruner) == (method.rows == "raters")


def test_what_prunes_inside_the_llm():
    inside = {name for name in BUILTIN if isinstance(load_method(name)(), LayerPruner)}
    assert inside == {"fastv", "fitprune", "pyramiddrop", "sparsevlm"}


@pytest.mark.parametrize(
    ("name", "layers", "points"),
    [
        ("fastv", 32, (1,)),
        ("fastv", 3, (1,)),
        ("pyramiddrop", 32, (7, 15, 23)),  # before layers 8, 16 and 24
        ("pyramiddrop", 40, (9, 19, 29)),
        ("pyramiddrop", 24, (5, 11, 17)),
        ("pyramiddrop", 5, (0, 1, 2)),
        ("pyramiddrop", 3, (0, 1)),  # too few layers for four stages
        ("pyramiddrop", 2, (0,)),
        ("sparsevlm", 32, (2, 6, 15)),
        ("sparsevlm", 40, (2, 7, 18)),
        ("sparsevlm", 24, (1, 4, 11)),
        ("sparsevlm", 3, (0, 1)),  # two stages in one layer
    ],
)
def test_where_a_method_prunes_inside_the_llm(name, layers, points):
    assert load_method(name)().layers(layers) == points


@pytest.mark.parametrize(
    ("name", "layers"), [("fastv", 2), ("fastv", 1), ("pyramiddrop", 1), ("fitprune", 4), ("sparsevlm", 1)]
)
def test_a_decoder_that_a_method_cannot_prune(name, layers):
    with pytest.raises(UnsupportedError) as caught:
        load_method(name)().layers(layers)
    assert caught.value.hint.endswith(".")


def test_a_method_of_somebody_else_keeps_a_name_when_it_is_given_as_an_object():
    assert method_name(load_method("fastv")) == "fastv"
    assert method_name(load_method("fopru-row")) == "fopru-row"
    assert method_name(type("Mine", (), {})) == "mine"


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
