"""Bundles with engines for the GPU that is not there, see `fake_tensorrt`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from fake_tensorrt import engine_bytes

from visprune.bundle import Bundle
from visprune.engines.rewrite_graph import prepare
from visprune.manifest import MANIFEST, SCHEMA_VERSION, Engine, FileRecord
from visprune.records import sha256
from visprune.runtime.backends.profiles import Limits, capacities, profiles, resolve_limits
from visprune.targets import TARGETS

VERSION = "10.16.1"


def with_engines(
    bundle,
    folder: Path,
    *,
    limits=None,
    in_place=True,
    rooms=None,
    target="tensorrt",
    version=VERSION,
    sms=(86,),
    size=0,
):
    """A copy of a bundle with an engine of every graph.

    Args:
        in_place: Whether caches are written in place; else a longer one is put out.
        rooms: By graph, the capacity of its cache where it is not that of the limits.
        target: As if it had been exported for that.
        size: Bytes of each engine, at least.
    """
    manifest = bundle.manifest
    limits = resolve_limits(manifest, limits or Limits())
    shutil.copytree(bundle.path, folder)
    (folder / "engines").mkdir()
    engines, files = [], dict(manifest.files)
    held = {**capacities(manifest, limits), **(rooms or {})} if in_place else {}
    for graph, made in profiles(manifest, limits, in_place=in_place).items():
        interface, capacity = manifest.graphs[graph], held.get(graph, 0)
        onnx = prepare(folder / interface.file, cache_capacity=capacity)
        for sm in sms:
            file = f"engines/{graph}.sm{sm}.engine"
            (folder / file).write_bytes(
                engine_bytes(
                    onnx.absolute(),
                    sm=sm,
                    version=version,
                    profiles=[{n: (r.least, r.most) for n, r in p.inputs.items()} for p in made],
                    shape_inputs=[spec.name for spec in interface.inputs if not spec.shape],
                    size=size,
                )
            )
            engines.append(Engine(graph, file, sm, TARGETS[target].engines, version, made, capacity))
            files[file] = FileRecord((folder / file).stat().st_size, sha256(folder / file))
    written = replace(
        manifest, schema_version=SCHEMA_VERSION, files=files, engines=tuple(engines), target=target
    )
    (folder / MANIFEST).write_text(written.to_json(), encoding="utf-8")
    return Bundle.open(folder)
