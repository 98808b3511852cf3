"""`visprune doctor`: the hardware and packages of this machine, and the parts of visprune that work on it."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from visprune.terminal import print_json

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
) -> None:
    """Show what this machine has and which parts of visprune can work on it.

    Example: visprune-doctor
    """
    from visprune.commands.features import features, look

    found = look()
    works = features(found)
    if as_json:
        print_json(
            {
                "machine": _here() | _hardware(),
                "packages": [asdict(one) for one in found.packages.values()],
                "onnxruntime_providers": list(found.providers),
                "features": [asdict(one) for one in works],
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    machine = {name: value for name, value in (_here() | _hardware()).items() if value is not None}
    for title, rows in (
        ("machine", [(name, str(value)) for name, value in machine.items()]),
        ("packages", [(one.name, one.version or "not installed") for one in found.packages.values()]),
        ("ONNX Runtime providers", [(name, "") for name in found.providers] or [("none", found.trouble)]),
        (
            "what works",
            [
                (one.name, ("yes" if one.works else "no") + (f": {one.note}" if one.note else ""))
                for one in works
            ],
        ),
    ):
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 2))
        for row in rows:
            table.add_row(*row)
        console.print(title)
        console.print(table)


def _here() -> dict[str, Any]:
    from visprune.caches import cache_dir
    from visprune.cores import usable_cores
    from visprune.version import __version__

    cache = cache_dir()
    existing = next((place for place in (cache, *cache.parents) if os.path.exists(place)), cache)  # noqa: PTH110 - a Path would raise where it may not look
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return {
        "visprune": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores used": usable_cores(),
        "cache": f"{cache}" + ("" if writable else " (not writable: files are hashed at every load)"),
    }


def _hardware() -> dict[str, Any]:
    """Return what `visprune.machine` finds; None for what is absent."""
    from visprune import machine

    gpu, jetson, memory = machine.gpu(), machine.jetson(), machine.memory()
    return {
        "memory": _gibibytes(memory),
        "gpu": gpu.name if gpu else "none found",
        "sm": gpu.sm if gpu else None,
        "gpu memory": _gibibytes(gpu.memory) if gpu else None,
        "nvidia driver": gpu.driver if gpu else None,
        "cuda": machine.cuda(),
        "jetson": jetson.model if jetson else None,
        "jetpack": jetson.jetpack if jetson else None,
        "l4t": jetson.l4t if jetson else None,
        "power mode": machine.power_mode() if jetson else None,
    }


def _gibibytes(size: int | None) -> str | None:
    return None if size is None else f"{size / (1 << 30):.1f} GiB"
