"""visprune: export LLaVA models with visual-token pruning to ONNX, and run them on small devices.

The two functions that most programs need. Each imports only what it uses:

    bundle = visprune.export("llava-hf/llava-1.5-7b-hf", method="fopru-rank", ratio=0.25)
    pipeline = visprune.load(bundle.path)
    print(pipeline.generate("cat.png", "What is in the picture?").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from visprune.version import __version__

if TYPE_CHECKING:
    from visprune.bundle import Bundle
    from visprune.engines import build
    from visprune.errors import VispruneError
    from visprune.export import export
    from visprune.export.fitprune.fitting import fit
    from visprune.export.preview import preview
    from visprune.quantize import quantize
    from visprune.runtime import load

__all__ = ["Bundle", "VispruneError", "__version__", "build", "export", "fit", "load", "preview", "quantize"]

_LAZY = {
    "Bundle": "visprune.bundle",
    "VispruneError": "visprune.errors",
    "build": "visprune.engines",
    "export": "visprune.export",
    "fit": "visprune.export.fitprune.fitting",
    "load": "visprune.runtime",
    "preview": "visprune.export.preview",
    "quantize": "visprune.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'visprune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
