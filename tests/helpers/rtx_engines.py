"""TensorRT-RTX engines of a bundle's graphs, in the product's own form, by its profiles and builder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from visprune.engines.builder import Request, build_engine
from visprune.engines.rewrite_graph import prepare
from visprune.runtime.backends.profiles import Limits, capacities, profiles

pytest.importorskip("tensorrt_rtx")


def check(bundle, names, sm=86):
    """Every graph of these becomes an engine."""
    found, rooms = profiles(bundle.manifest, Limits(), in_place=True), capacities(bundle.manifest, Limits())
    consistent(bundle, profiles(bundle.manifest, Limits()))
    consistent(bundle, found, rooms)
    for name in names:
        onnx = bundle.file(bundle.manifest.graphs[name].file)
        made = prepare(onnx, cache_capacity=rooms.get(name, 0))
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "engine"
            build_engine(Request(name, str(made), str(output), "tensorrt_rtx", sm, found[name]))
            assert output.stat().st_size > 0, name
        if made != onnx:
            made.unlink()


def consistent(bundle, found, rooms=None):
    """Everything that varies has a range, ranges ascend, and K is never more than it is taken of.

    Caches that are written in place have `rooms`, and do not vary.
    """
    manifest = bundle.manifest
    assert set(found) == {stage.graph for stage in manifest.stages}
    for name, profiles_ in found.items():
        graph = manifest.graphs[name]
        vary = {s.name for s in graph.inputs if not s.shape or any(isinstance(d, str) for d in s.shape)}
        past = {spec.name for spec in graph.inputs if "P" in spec.shape}
        vary -= past if rooms is not None else set()
        assert [p.name for p in profiles_] == (["prefill", "decode"] if past else ["all"] if vary else [])
        for profile in profiles_:
            assert set(profile.inputs) == vary, name
            dims = {}
            for spec in graph.inputs:
                for least, usual, most in zip(*_rows(profile.inputs.get(spec.name)), strict=True):
                    assert 0 <= least <= usual <= most
                for place, dim in enumerate(spec.shape):
                    ranges = _rows(profile.inputs.get(spec.name))
                    if spec.name in vary:
                        got = tuple(row[place] for row in ranges)
                        assert dims.setdefault(dim, got) == got, (name, spec.name)
                        assert isinstance(dim, str) or got == (dim,) * 3
            if name == "segment_pruner":
                assert all(k <= s for k, (s,) in zip(_count(profile), zip(dims["S"]), strict=True))
            if name == "token_pruner" and "keep_tokens" in vary:
                scope = manifest.pruning.budget.scope
                tiles = dims.get("T", (1, 1, 1)) if manifest.tiling and scope == "image" else (1, 1, 1)
                slots = manifest.pruning.budget.visual_tokens
                assert all(k <= t * slots for k, t in zip(_count(profile), tiles, strict=True))
            if rooms is not None and past:
                assert dims["S"][2] <= rooms[name]


def _rows(ranges):
    return (ranges.least, ranges.usual, ranges.most) if ranges else ((), (), ())


def _count(profile):
    return [row[0] for row in _rows(profile.inputs["keep_tokens"])]
