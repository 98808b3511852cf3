"""ONNX Runtime on the CPU.

A decoder whose cache can be written in place is rewritten when it is loaded; see `cache_rewrite`. What stays
mapped of the weights, and was read only to be copied, is dropped from memory; see `mapped`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from visprune.bundle import Bundle
from visprune.cache_names import PAST
from visprune.optional import require
from visprune.runtime.backends.cache_rewrite import rewrite_cache
from visprune.runtime.backends.host_cache import InPlaceRunner
from visprune.runtime.backends.mapped import drop_pages
from visprune.runtime.backends.ort import (
    CPU,
    OrtRunner,
    check_specs,
    open_graph,
    open_session,
    session_options,
    settings_for,
)
from visprune.runtime.backends.runner import BackendOptions

__all__ = ["open_cpu", "open_model"]

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def open_cpu(bundle: Bundle, graph: str, options: BackendOptions) -> OrtRunner:
    """Load a graph on the CPU.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BundleError: ONNX Runtime cannot read the graph, or the graph differs from the manifest.
        UnsupportedError: There is not enough memory.
    """
    ort = require("onnxruntime", extra="cpu")
    settings = settings_for(ort, bundle, graph, options)
    data = bundle.manifest.graphs[graph].data
    weights = bundle.file(data).resolve() if data else None
    rewritten = _rewritten(bundle, graph, weights) if _has_float_cache(bundle, graph) else None
    if rewritten is None:
        runner = open_graph(ort, bundle, graph, settings, [(CPU, {})])
    else:
        if weights is not None:
            settings.add_session_config_entry(_WEIGHTS_FOLDER, str(weights.parent))
        runner = InPlaceRunner(ort, open_session(ort, rewritten, settings, [(CPU, {})], graph), graph)
        check_specs(bundle, graph, runner.specs)
    if weights is not None:
        drop_pages(weights)
    return runner


def open_model(model: bytes, folder: Path, graph: str, options: BackendOptions) -> OrtRunner:
    """Load a model on the CPU that is not a file of a bundle.

    Args:
        model: A serialized ONNX model.
        folder: Directory of its external data.
        graph: Name for messages.
        options: As for a graph of a bundle.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        BundleError: ONNX Runtime cannot read the model.
        UnsupportedError: There is not enough memory.
    """
    ort = require("onnxruntime", extra="cpu")
    settings = session_options(ort, options, gpu=False)
    settings.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
    return OrtRunner(ort, open_session(ort, model, settings, [(CPU, {})], graph), graph)


def _rewritten(bundle: Bundle, graph: str, weights: Path | None) -> bytes | None:
    """Return a graph rewritten for a cache in place, or None.

    ONNX Runtime follows no links from a model that is no file. So the weights, which the hub's cache keeps
    behind a link, are named as the file that the link leads to.
    """
    told = bundle.manifest.graphs[graph]
    content = bundle.file(told.file).read_bytes()
    if told.data is None or weights is None:
        return rewrite_cache(content)
    named = PurePosixPath(told.data).relative_to(PurePosixPath(told.file).parent)
    return rewrite_cache(content, (str(named), weights.name))


def _has_float_cache(bundle: Bundle, graph: str) -> bool:
    """Return whether a graph has a cache in float32. In float16, ONNX Runtime has it for few processors."""
    inputs = bundle.manifest.graphs[graph].inputs
    return any(spec.name.startswith(PAST) and spec.dtype == "float32" for spec in inputs)
