"""Quantization of bundles: INT8, FP8 and INT4 for the linear layers, with a report of its cost and its gain.

The package knows graphs and bundles, and no model family; it needs neither PyTorch nor transformers. Like
`visprune.export` it can be called: it is then the function `quantize`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from visprune.quantize.quantize_options import QuantizeOptions
from visprune.quantize.quantizer import quantize

__all__ = ["QuantizeOptions", "quantize"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
