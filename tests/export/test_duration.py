"""The estimate of how long an export takes, against the exports that it comes from."""

from __future__ import annotations

import re

import pytest

from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.duration import expected
from visprune.export.files.stored import StoredTensor


@pytest.fixture
def checkpoint_of(tmp_path):
    """Make a checkpoint of so many parameters, whose weights are a hole in the disk."""

    def make(elements, item_size):
        file = tmp_path / "model.safetensors"
        with file.open("wb") as stream:
            stream.truncate(elements * item_size)
        tensor = StoredTensor("w", file, 0, elements * item_size, "F32", (elements,))
        return Checkpoint("m", tmp_path, "llava", (file,), {"w": tensor})

    return make


@pytest.mark.parametrize(
    ("elements", "item_size", "scope", "measured"),
    [
        (800_000_000, 4, None, (96, 96)),
        (800_000_000, 4, "whole", (176, 176)),
        (7_060_000_000, 2, "layers", (248, 367)),
    ],
)
def test_it_is_near_what_was_measured(elements, item_size, scope, measured, checkpoint_of):
    said = expected(checkpoint_of(elements, item_size), scope, fits=False)
    count, unit = re.match(r"This export should take about (\d+) (seconds|minutes)\. ", said).groups()
    seconds = int(count) * (60 if unit == "minutes" else 1)
    assert 0.8 * measured[0] <= seconds <= 1.2 * measured[1]
    assert "measured on two processor cores" in said


def test_a_fit_takes_longer(checkpoint_of):
    said = expected(checkpoint_of(800_000_000, 4), None, fits=True)
    assert "after a fit of about 15 seconds a sample" in said  # 239 s for 16


def test_small_models(checkpoint_of):
    for fits in (False, True):
        said = expected(checkpoint_of(3_000_000, 2), "whole", fits=fits)
        assert said == "This export should take under a minute."
