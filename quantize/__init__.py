"""Quantize bundles: INT8, FP8 and INT4 for the linear layers, with a report of what that costs and gains.

Knows graphs and bundles, and no model family; needs neither PyTorch nor transformers.
"""

from __future__ import annotations

from visprune.quantize.options import QuantizeOptions
from visprune.quantize.quantizer import quantize

__all__ = ["QuantizeOptions", "quantize"]
