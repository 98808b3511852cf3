"""`visprune doctor`: what this machine has, and which parts of visprune can work on it."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from visprune.commands.terminal import print_json

__all__ = ["doctor"]

# Distribution names that may bring a module, and the extra that installs the first; None: nothing uses it.
_PACKAGES = {
    "onnxruntime": (("onnxruntime",), "cpu"),
    "onnxruntime-gpu": (("onnxruntime-gpu",), "gpu"),
    "torch": (("torch",), "export"),
    "transformers": (("transformers",), "export"),
    "onnx": (("onnx",), "export"),
    "onnxscript": (("onnxscript",), "export"),
    "safetensors": (("safetensors",), "export"),
    "tensorrt": (("tensorrt", "tensorrt-cu12", "tensorrt-cu13"), None),
    "tensorrt-rtx": (("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"), None),
}
_EXPORT = ("torch", "transformers", "onnx", "onnxscript", "safetensors")
_JETPACK = Path("/etc/nv_tegra_release")
_NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class _Package:
    name: str
    version: str | None
    install: str | None


@dataclass(frozen=True, slots=True)
class _Feature:
    name: str
    works: bool
    note: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
) -> None:
    """Show what this machine has and which parts of visprune can work on it.

    Example: visprune-doctor
    """
    packages = [_package(name) for name in _PACKAGES]
    providers, trouble = _providers()
    machine = _machine()
    features = _features({p.name: p.version for p in packages}, providers, trouble)
    if as_json:
        print_json(
            {
                "machine": machine,
                "packages": [asdict(p) for p in packages],
                "onnxruntime_providers": providers,
                "features": [asdict(f) for f in features],
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for title, rows in (
        ("machine", [(name, str(value)) for name, value in machine.items()]),
        ("packages", [(p.name, _version(p)) for p in packages]),
        ("ONNX Runtime providers", [(name, "") for name in providers] or [("none", trouble)]),
        (
            "what works",
            [(f.name, ("yes" if f.works else "no") + (f": {f.note}" if f.note else "")) for f in features],
        ),
    ):
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 2))
        for row in rows:
            table.add_row(*row)
        console.print(title)
        console.print(table)


def _package(name: str) -> _Package:
    distributions, extra = _PACKAGES[name]
    version = None
    for distribution in distributions:
        try:
            version = metadata.version(distribution)
            break
        except Exception:  # not only "not found": a half-removed package has no readable metadata
            continue
    return _Package(name, version, f'pip install "visprune[{extra}]"' if extra else None)


def _version(package: _Package) -> str:
    if package.install is None:
        return f"{package.version or 'not installed'}, not used in this version"
    return package.version or f"not installed: {package.install}"


def _machine() -> dict[str, Any]:
    from visprune import __version__
    from visprune.runtime.cores import usable_cores
    from visprune.runtime.verified import cache_dir

    cache = cache_dir()
    existing = next((place for place in (cache, *cache.parents) if place.exists()), cache)
    writable = os.access(existing, os.W_OK)
    return {
        "visprune": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "jetpack": _first_line(_JETPACK) or "not a Jetson",
        "nvidia driver": _first_line(_NVIDIA) or "none found",
        "cores used": usable_cores(),
        "cache": f"{cache}" + ("" if writable else " (not writable: files are hashed at every load)"),
    }


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _providers() -> tuple[list[str], str]:
    """The providers ONNX Runtime was built with, or why it cannot be asked."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        return [], "ONNX Runtime is not installed"
    except Exception as error:  # a wheel for another platform, a missing system library
        return [], f"ONNX Runtime cannot be imported: {error}"
    try:
        return list(onnxruntime.get_available_providers()), ""
    except Exception as error:  # both builds in one environment leave a package without its parts
        return (
            [],
            f"ONNX Runtime is damaged ({error}): pip uninstall -y onnxruntime onnxruntime-gpu, install one",
        )


def _features(versions: dict[str, str | None], providers: list[str], trouble: str) -> list[_Feature]:
    cpu = "CPUExecutionProvider" in providers
    cuda = "CUDAExecutionProvider" in providers
    missing = [name for name in _EXPORT if versions[name] is None]
    cuda_note = "the build has CUDA; whether it starts shows at the first run" if cuda else ""
    if not cuda:
        cuda_note = 'needs: pip uninstall -y onnxruntime; pip install "visprune[gpu]"'
    elif _first_line(_NVIDIA) is None and _first_line(_JETPACK) is None:
        cuda, cuda_note = False, "no NVIDIA driver found"
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        cuda_note += "; onnxruntime and onnxruntime-gpu are both installed and clash"
    return [
        _Feature("run on CPU", cpu, "" if cpu else f'{trouble}; pip install "visprune[cpu]"'),
        _Feature("run on CUDA", cuda, cuda_note),
        _Feature(
            "export",
            not missing,
            f'missing {", ".join(missing)}; pip install "visprune[export]"' if missing else "",
        ),
        _Feature("build engines", False, "not in this version"),
    ]
