"""TensorRT-RTX engines of a bundle's graphs, by the product's own profiles and builder, in this process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from visprune.engines.builder import Request, build_engine
from visprune.runtime.profiles import Limits, profiles

pytest.importorskip("tensorrt_rtx")


def check(bundle, names, sm=86):
    """Every graph of these becomes an engine."""
    found = profiles(bundle.manifest, Limits())
    consistent(bundle, found)
    for name in names:
        graph = bundle.manifest.graphs[name]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "engine"
            request = Request(
                name, str(bundle.file(graph.file)), str(output), "tensorrt_rtx", sm, found[name]
            )
            build_engine(request)
            assert output.stat().st_size > 0, name


def consistent(bundle, found):
    """Everything that varies has a range, ranges ascend, and K is never more than it is taken of."""
    manifest = bundle.manifest
    assert set(found) == {stage.graph for stage in manifest.stages}
    for name, profiles_ in found.items():
        graph = manifest.graphs[name]
        vary = {s.name for s in graph.inputs if not s.shape or any(isinstance(d, str) for d in s.shape)}
        past = any("P" in spec.shape for spec in graph.inputs)
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


def _rows(ranges):
    return (ranges.least, ranges.usual, ranges.most) if ranges else ((), (), ())


def _count(profile):
    return [row[0] for row in _rows(profile.inputs["keep_tokens"])]
