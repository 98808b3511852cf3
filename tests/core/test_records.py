"""Dataclasses are read from JSON strictly, and an error names the place of the field."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from visprune.errors import BundleError, UsageError
from visprune.records import from_json, sha256


@dataclass(frozen=True, slots=True)
class Inner:
    size: int
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError(f"The size {self.size} is negative.", "Give another.")


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    pair: tuple[int, int]
    many: tuple[Inner, ...]
    table: dict[str, Inner]
    dims: tuple[int | str, ...]
    maybe: int | None
    other: Inner | None = field(default=None, kw_only=True)
    anything: dict[str, Any]
    flag: bool = False
    default: dict[str, int] = field(default_factory=dict)


def good() -> dict[str, Any]:
    return {
        "name": "x",
        "kind": "a",
        "pair": [1, 2],
        "many": [{"size": 1, "share": 0.5}, {"size": 2}],
        "table": {"k": {"size": 3}},
        "dims": ["T", 3],
        "maybe": None,
        "anything": {"seed": 0, "deep": [{"x": None}]},
    }


def test_a_whole_record_is_read():
    outer = from_json(Outer, good(), "file")
    assert outer.many == (Inner(1, 0.5), Inner(2))
    assert outer.table == {"k": Inner(3)}
    assert outer.dims == ("T", 3)
    assert (outer.flag, outer.default) == (False, {})


def test_writing_and_reading_give_the_same_record():
    outer = from_json(Outer, good(), "file")
    assert from_json(Outer, json.loads(json.dumps(asdict(outer))), "file") == outer


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"name": 1}, "file.name"),
        ({"name": None}, "file.name"),
        ({"kind": "c"}, "file.kind"),
        ({"kind": ["a"]}, "file.kind"),
        ({"pair": [1]}, "file.pair"),
        ({"pair": [1, 2, 3]}, "file.pair"),
        ({"pair": [1, True]}, r"file.pair\[1\]"),
        ({"pair": [1, 2.0]}, r"file.pair\[1\]"),
        ({"pair": "12"}, "file.pair"),
        ({"pair": {"0": 1, "1": 2}}, "file.pair"),
        ({"many": [{"size": 1}, {"size": "2"}]}, r"file.many\[1\].size"),
        ({"many": [{"size": True}]}, r"file.many\[0\].size"),
        ({"many": {}}, "file.many"),
        ({"table": []}, "file.table"),
        ({"table": {"k": {"size": 1, "share": "half"}}}, "file.table.k.share"),
        ({"table": {"k": {"size": 1, "share": True}}}, "file.table.k.share"),
        ({"dims": [True]}, r"file.dims\[0\]"),
        ({"dims": [None]}, r"file.dims\[0\]"),
        ({"maybe": "0"}, "file.maybe"),
        ({"maybe": False}, "file.maybe"),
        ({"other": 3}, "file.other"),
        ({"other": {"size": "1"}}, "file.other.size"),
        ({"flag": 0}, "file.flag"),
        ({"anything": []}, "file.anything"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_its_place(change, place):
    with pytest.raises(BundleError, match=f"^{place} should be"):
        from_json(Outer, good() | change, "file")


@pytest.mark.parametrize("data", [None, [], "x", 3, True, [["name", "x"]]])
def test_something_that_is_no_record_is_refused(data):
    with pytest.raises(BundleError, match=r"^file should be Outer"):
        from_json(Outer, data, "file")


def test_an_unknown_field_is_refused():
    with pytest.raises(BundleError, match=r"^file.many\[0\] has an unknown field 'colour'"):
        from_json(Outer, good() | {"many": [{"size": 1, "colour": "red"}]}, "file")


def test_a_missing_field_is_refused():
    data = good()
    del data["pair"]
    with pytest.raises(BundleError, match=r"^file has no 'pair'"):
        from_json(Outer, data, "file")


def test_an_integer_serves_where_a_float_is_wanted():
    share = from_json(Inner, {"size": 1, "share": 2}, "file").share
    assert share == 2.0
    assert type(share) is float


def test_an_integer_that_no_float_holds_is_refused():
    with pytest.raises(BundleError, match=r"file\.share should be float"):
        from_json(Inner, {"size": 1, "share": 10**400}, "file")


def test_the_checks_of_a_dataclass_are_named_with_their_place():
    with pytest.raises(BundleError, match=r"^file.table.k cannot be used: The size -1 is negative"):
        from_json(Outer, good() | {"table": {"k": {"size": -1}}}, "file")


@pytest.mark.parametrize("size", [0, 1, 1 << 22, (1 << 22) + 1])
def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int):
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_integers_have_64_bits(number):
    with pytest.raises(BundleError, match=r"x\.size is a number of \d+ digits, and 64 bits"):
        from_json(Inner, {"size": number}, "x")
    with pytest.raises(BundleError, match=r"x\.dims\[0\] should be"):
        from_json(Outer, {**good(), "dims": [number]}, "x")
    assert from_json(Inner, {"size": 2**63 - 1}, "x").size == 2**63 - 1
