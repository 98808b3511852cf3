"""Engines that were built before, under `~/.cache/visprune/engines`.

An entry is one file, KEY.SHA256.engine: what it was built from, and the hash of what is in it. So it comes
whole by one rename, and says itself whether it is damaged. Two processes that build the same engine at once
leave two entries, of which either will do. The folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from visprune.caches import cache_dir, keep
from visprune.engines.builder import Request
from visprune.manifest import Manifest
from visprune.records import sha256

__all__ = ["fetch", "key", "store", "timing_cache"]

_FORM = 1  # one more where `build_engine` sets other options


def key(manifest: Manifest, request: Request, version: str, gpu: str = "") -> str:
    """The name of an engine: the hash of all that it depends on.

    The ONNX file that is built says how the graph is spelled, how its cache is written and for how many
    tokens it has room; its weights have the hash that the manifest has for them. `gpu` is the name of the
    one that is here, where engines are built for that alone.
    """
    data = manifest.graphs[request.graph].data
    parts = {
        "form": _FORM,
        "gpu": gpu,
        "onnx": sha256(Path(request.onnx)),
        "weights": manifest.files[data].sha256 if data else "",
        "flavour": request.flavour,
        "version": version,
        "sm": request.sm,
        "profiles": [asdict(profile) for profile in request.profiles],
        "workspace": request.workspace,
        "dtype": manifest.dtype,
        "quantized": sorted(manifest.quantization.precisions(request.graph)) if manifest.quantization else [],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fetch(name: str, place: Path) -> bool:
    """Copy an engine to `place`, if there is a good one. A damaged one is removed."""
    entries: list[Path] = []
    with suppress(OSError):  # it may not be looked into
        entries = sorted(_folder().glob(f"{name}.*.engine"))
    for entry in entries:
        with suppress(OSError):  # another process may remove it
            shutil.copyfile(entry, place)
            if sha256(place) == entry.name.split(".")[1]:
                return True
            entry.unlink()
    place.unlink(missing_ok=True)
    return False


def store(name: str, engine: Path) -> None:
    """Keep an engine in the cache, where that can be written."""
    keep(_folder() / f"{name}.{sha256(engine)}.engine", lambda file: shutil.copyfile(engine, file))


def timing_cache(version: str, sm: int) -> str | None:
    """The file of what TensorRT measured while building; None where it cannot be kept."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder / f"tensorrt-{version}-sm{sm}.timings") if os.access(folder, os.W_OK) else None


def _folder() -> Path:
    return cache_dir("engines")
