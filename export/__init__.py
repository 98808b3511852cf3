"""The export of a checkpoint to a bundle.

`visprune.export` is both this package and the function that users call. The package can be called, so
`visprune.export(...)` works whichever of the two was imported first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from visprune.packages import lazy, make_callable

if TYPE_CHECKING:
    from visprune.export.exporter import ExportOptions, export

__all__ = ["ExportOptions", "export"]

# Lazily, because a command line needs the options without the exporter.
__getattr__ = lazy(__name__, dict.fromkeys(__all__, "visprune.export.exporter"))

make_callable(__name__)
