"""TensorRT engines of the graphs of a bundle, built from the manifest and the ONNX files alone.

The package knows graphs and bundles, and no model family. It needs neither PyTorch nor onnx, and for
TensorRT-RTX no GPU.
"""

from __future__ import annotations

from visprune.engines.build_job import build
from visprune.engines.build_options import BuildOptions, Caps
from visprune.runtime.backends.profiles import Limits

__all__ = ["BuildOptions", "Caps", "Limits", "build"]
