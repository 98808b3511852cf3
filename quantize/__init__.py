"""Quantization of bundles: INT8, FP8 and INT4 for the linear layers, with a report of its cost and its gain.

The package knows graphs and bundles, and no model family; it needs neither PyTorch nor transformers. Like
`visprune.export` it can be called: it is then the function `quantize`.
"""

from __future__ import annotations

from visprune.packages import make_callable
from visprune.quantize.quantize_options import QuantizeOptions
from visprune.quantize.quantizer import quantize

__all__ = ["QuantizeOptions", "quantize"]

make_callable(__name__)
