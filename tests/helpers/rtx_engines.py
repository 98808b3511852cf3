"""TensorRT-RTX engines of a bundle's graphs, by the product's own profiles and builder, in this process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from visprune.engines.builder import Request, build_engine
from visprune.engines.profiles import Limits, profiles

pytest.importorskip("tensorrt_rtx")


def check(bundle, names, sm=86):
    """Every graph of these becomes an engine."""
    found = profiles(bundle.manifest, Limits())
    for name in names:
        graph = bundle.manifest.graphs[name]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "engine"
            request = Request(
                name, str(bundle.file(graph.file)), str(output), "tensorrt_rtx", sm, found[name]
            )
            build_engine(request)
            assert output.stat().st_size > 0, name
