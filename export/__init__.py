"""The export of a checkpoint to a bundle.

`visprune.export` is both this package and the function that users call. The package can be called, so
`visprune.export(...)` works whichever of the two was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprune.export.exporter import ExportOptions, export

__all__ = ["ExportOptions", "export"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from visprune.export.exporter import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable


def __getattr__(name: str) -> Any:
    # Lazily, because a command line needs the options without the exporter.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from visprune.export import exporter

    return getattr(exporter, name)
