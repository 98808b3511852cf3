"""Quantization of bundles: INT8, FP8 and INT4 for the linear layers, with a report of its cost and its gain.

The package knows graphs and bundles, and no model family; it needs neither PyTorch nor transformers. Like
`visprune.export` it can be called: it is then the function `quantize`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from visprune.packages import lazy, make_callable

if TYPE_CHECKING:
    from visprune.quantize.quantize_options import QuantizeOptions
    from visprune.quantize.quantizer import quantize

__all__ = ["QuantizeOptions", "quantize"]

# Lazily, because a command line needs the options without NumPy.
__getattr__ = lazy(
    __name__,
    {
        "QuantizeOptions": "visprune.quantize.quantize_options",
        "quantize": "visprune.quantize.quantizer",
    },
)

make_callable(__name__)
