"""Settings of tiling: wrong ones are refused, and right ones survive JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from visprune.errors import BundleError, UsageError
from visprune.records import from_json
from visprune.tiling import Tiling

TILING = Tiling(((28, 56), (56, 28)), 28, 2, max_tiles=9, several="whole")


def test_a_way_through_json():
    for tiling in (TILING, Tiling(((336, 672),), 336, 24), replace(TILING, frame_pooling=2)):
        assert from_json(Tiling, json.loads(json.dumps(asdict(tiling))), "visprune.json") == tiling


@pytest.mark.parametrize(
    "change",
    [
        {"pinpoints": ()},
        {"pinpoints": ((28, 57),)},
        {"pinpoints": ((28, 56), (0, 28))},
        {"pinpoints": ((-28, 28),)},
        {"tile_size": 0},
        {"tile_size": -28},
        {"side": 0},
        {"side": 29},
        {"max_tiles": 0},
        {"frame_pooling": 0},
        {"frame_pooling": 3},
    ],
    ids=str,
)
def test_numbers_that_describe_no_tiles(change):
    with pytest.raises(UsageError):
        replace(TILING, **change)


def test_a_manifest_from_before_frames_were_pooled():
    older = {key: value for key, value in asdict(TILING).items() if key != "frame_pooling"}
    assert from_json(Tiling, json.loads(json.dumps(older)), "visprune.json") == TILING


def test_what_mixes_tokens():
    plain = replace(TILING, max_tiles=None)
    assert [t.resamples for t in (plain, TILING, replace(plain, frame_pooling=2))] == [False, True, True]


def test_a_word_for_several_pictures_that_is_none():
    with pytest.raises(BundleError, match="several"):
        from_json(Tiling, {**json.loads(json.dumps(asdict(TILING))), "several": "none"}, "visprune.json")
