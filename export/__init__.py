"""From a checkpoint to a bundle.

`visprune.export` is both this package and the function users call; a module that can be called lets
`visprune.export(...)` work whichever was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from visprune.export.exporter import ExportOptions, export

__all__ = ["ExportOptions", "export"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
