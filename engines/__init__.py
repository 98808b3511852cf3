"""TensorRT engines of a bundle's graphs, built from the manifest and the ONNX files alone.

Knows graphs and bundles, and no model family; needs neither PyTorch nor onnx, and no GPU for TensorRT-RTX.
"""

from __future__ import annotations

from visprune.engines.build_job import build
from visprune.engines.builder import Caps
from visprune.runtime.backends.profiles import Limits

__all__ = ["Caps", "Limits", "build"]
