"""The table of boards agrees with the figures that NVIDIA prints."""

from __future__ import annotations

import pytest

from visprune.errors import UnsupportedError, UsageError
from visprune.estimate.boards import BOARDS, board
from visprune.targets import FP8_SM

TERA = 1e12


@pytest.mark.parametrize(
    ("name", "precision", "printed"),
    [
        # Dense figures as printed, or half of a printed sparse figure; those of Jetsons without the DLAs.
        ("orin-nano-4gb", "int8", 20 / 2),
        ("orin-nano-8gb", "int8", 40 / 2),
        ("orin-nano-8gb-super", "int8", 67 / 2),
        ("orin-nano-8gb-super", "fp16", 17),
        ("orin-nx-16gb", "fp16", 15),
        ("orin-nx-16gb-super", "fp16", 19),
        ("agx-orin-32gb", "int8", 108 / 2),
        ("agx-orin-64gb", "int8", 170 / 2),
        ("agx-thor", "fp8", 1035 / 2),
        ("rtx-3060", "int8", 102),
        ("rtx-3090", "fp16", 71),
        ("rtx-3090", "int8", 284),
        ("rtx-4060", "int8", 242 / 2),
        ("rtx-4070", "int8", 466 / 2),
        ("rtx-4090", "fp16", 165.2),
        ("rtx-4090", "fp8", 330.3),
        ("rtx-4090", "int8", 660.6),
        ("rtx-5090", "fp16", 209.5),
        ("rtx-5090", "int8", 838),
    ],
)
def test_peaks_are_those_in_print(name, precision, printed):
    assert board(name).peak(precision) / TERA == pytest.approx(printed, rel=0.03)


@pytest.mark.parametrize("name", BOARDS)
def test_a_row_makes_sense(name):
    found = board(name)
    assert found.name == name
    assert found.source
    assert 0 < found.usable < found.memory * 1024**3
    assert ("jetson" in found.title.lower()) == found.shared
    assert ("fp8" in found.precisions) == (found.sm >= FP8_SM)
    assert found.peak("int4") == found.peak("fp16")
    for precision in found.precisions:
        assert found.peak(precision) >= found.peak("fp16")


def test_super_is_faster_than_the_same_board_without():
    for name in ("orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb"):
        plain, faster = board(name), board(f"{name}-super")
        assert plain.memory == faster.memory
        assert plain.bandwidth <= faster.bandwidth
        assert plain.peak("int8") < faster.peak("int8")


@pytest.mark.parametrize(
    ("name", "guess"), [("orin-nx-16g", "orin-nx-16gb"), ("RTX-4090", "rtx-4090"), ("quantum", None)]
)
def test_an_unknown_device_gets_a_guess_and_the_list(name, guess):
    with pytest.raises(UsageError, match="There is no device") as caught:
        board(name)
    assert (f"Did you mean {guess!r}?" in caught.value.hint) == (guess is not None)
    assert all(known in caught.value.hint for known in BOARDS)


def test_a_rate_that_is_not_published_is_refused():
    with pytest.raises(UnsupportedError, match="int8 rate"):
        board("agx-thor").peak("int8")
    with pytest.raises(UnsupportedError, match="fp8 rate"):
        board("agx-orin-32gb").peak("fp8")
