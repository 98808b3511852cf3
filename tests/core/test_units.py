"""Sizes for people."""

from __future__ import annotations

import pytest

from visprune.units import in_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (4_370_000, "4.37 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1 GB"),
        (14_100_000_000, "14.1 GB"),
        (2_500_000_000_000, "2.5 TB"),
    ],
)
def test_three_digits_in_decimal_units(count, text):
    assert in_bytes(count) == text
