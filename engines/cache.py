"""Cache of built engines, under `~/.cache/visprune/engines`.

An entry is one file, KEY.SHA256.engine. KEY is a hash of everything that the engine was built from, and
SHA256 is the hash of the file. So an entry appears whole, by one rename, and damage is detected without a
second file. Two processes that build the same engine at once may leave two entries; either can be used. The
directory may be removed at any time.
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

_FORM = 1  # increase it when `build_engine` sets other options


def key(manifest: Manifest, request: Request, version: str, gpu: str = "") -> str:
    """Return the hash of everything that an engine depends on.

    The rewritten ONNX file has the operators of the graph, and how its cache is written and for how many
    tokens. The hash of its weights is the one in the manifest.

    Args:
        manifest: Manifest of the bundle.
        request: The engine to build.
        version: Version of the package that builds it.
        gpu: Name of the GPU of this machine, if engines are built for this GPU alone.
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


def fetch(key: str, destination: Path) -> bool:
    """Copy an engine from the cache to a file, and remove damaged entries.

    Returns:
        Whether there was an undamaged entry.
    """
    entries: list[Path] = []
    with suppress(OSError):  # the directory may be unreadable
        entries = sorted(_folder().glob(f"{key}.*.engine"))
    for entry in entries:
        with suppress(OSError):  # another process may remove the entry meanwhile
            shutil.copyfile(entry, destination)
            if sha256(destination) == entry.name.split(".")[1]:
                return True
            entry.unlink()
    destination.unlink(missing_ok=True)
    return False


def store(key: str, engine: Path) -> None:
    """Keep an engine in the cache; nothing happens if the cache cannot be written."""
    keep(_folder() / f"{key}.{sha256(engine)}.engine", lambda file: shutil.copyfile(engine, file))


def timing_cache(version: str, sm: int) -> str | None:
    """Return the file for TensorRT's measurements of kernels; None if the cache cannot be written."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder / f"tensorrt-{version}-sm{sm}.timings") if os.access(folder, os.W_OK) else None


def _folder() -> Path:
    return cache_dir("engines")
