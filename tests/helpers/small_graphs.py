"""Graphs of a few nodes, made in code, and what runs and rewrites them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from visprune.manifest import Graph
from visprune.quantize.layer_choices import GraphChoices, LayerChoice
from visprune.quantize.quantize_options import ResolvedOptions
from visprune.quantize.quantized_graph import write_quantized

node = onnx.helper.make_node


def model(nodes, inputs, outputs, constants, dtype="float32"):
    """A model for onnx_ir: inputs and shapes, outputs that may have shapes, constants and arrays, by name."""
    shapes = outputs if isinstance(outputs, dict) else dict.fromkeys(outputs)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.helper.make_graph(
        nodes,
        "decoder",
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(made)


def settings(precision, dtype="float32", block_size=32):
    """Every part in one precision."""
    parts = dict.fromkeys(("vision", "projector", "decoder", "head"), precision) | {"embedding": "float"}
    return ResolvedOptions(parts, dtype, "max", smooth=True, block_size=block_size)


def write(made, plan, chosen, folder, shares=False):
    """Rewrite a model by a plan: the path of the graph."""
    file = Graph("graph.onnx", None, (), ())
    return folder / write_quantized(made, plan, replace(chosen, for_engines=shares), folder, file).file


def planned(precision, scales):
    """Layers in a precision, each with the scale of its activation."""
    return GraphChoices({name: LayerChoice(precision, scale) for name, scale in scales.items()})


def run(path, feeds, optimized=True):
    """The outputs of a graph on the CPU."""
    return session(path, optimized).run(None, feeds)


def session(path, optimized=True, written=None):
    """A session as the runtime makes it; `written` is where to put the optimized graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    if written is not None:
        options.optimized_model_filepath = str(written)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def operators(path):
    """How often each operator is in a graph."""
    counts: dict[str, int] = {}
    for one in onnx.load(path, load_external_data=False).graph.node:
        counts[one.op_type] = counts.get(one.op_type, 0) + 1
    return counts


def drawn(*shape, seed=0, dtype="float32"):
    """Numbers, the same each time."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)
