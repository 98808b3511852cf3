"""The form of a graph that engines are built from: one integer per token, and a cache written in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from visprune.engines.in_place import write_in_place
from visprune.engines.nodes import Nodes
from visprune.errors import BundleError

__all__ = ["prepare"]


def prepare(onnx: Path, *, cache_capacity: int) -> Path:
    """Write the form of a graph that an engine is built from, beside it. It uses the same file of weights.

    A graph with `logits` [B, 1, V] gets one more output, `greedy_token` [B] int64: the index of the largest
    logit, the lowest index at ties; -1 if a logit is NaN or +inf, or if all are -inf.

    With a capacity C, the cache of a decoder is written in place:

        past_key_values.{i}.key   [1, Hkv, C, Dh]   and .value: buffers; all their values are finite, also of
                                                    unused places
        cache_length              [1] int64         P, the tokens that the buffers hold; P + S <= C
        present.{i}.key           [1, Hkv, C, Dh]   and .value: the same buffers, written from P on. TensorRT
                                                    requires that they have the addresses of the inputs

    Args:
        onnx: A graph that the exporter wrote, quantized or not.
        cache_capacity: C; 0 leaves the cache as it is.

    Returns:
        The file written, or `onnx` if nothing is to change.

    Raises:
        EngineError: The graph has no cache, or reads it in an unknown way.
        BundleError: The file is not an ONNX graph.
    """
    try:
        model = ir.load(onnx)
    except Exception as error:  # protobuf raises exceptions of its own
        raise BundleError(
            f"{onnx.name} is no ONNX graph.", "Copy the bundle again, or export it again."
        ) from error
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if logits is None and cache_capacity == 0:
        return onnx
    nodes = Nodes(model.graph)
    if logits is not None:
        _add_greedy_token(nodes, logits)
    if cache_capacity > 0:
        write_in_place(model, nodes, onnx.stem, cache_capacity)
    model.graph.sort()
    made = onnx.with_suffix(f".engine{cache_capacity}.onnx")
    ir.save(model, made)
    return made


def _add_greedy_token(nodes: Nodes, logits: ir.Value) -> None:
    """Add the output `greedy_token`.

    `ArgMax` is not used, because it is not documented how TensorRT's treats ties and NaNs.
    """
    assert logits.shape is not None
    assert logits.dtype is not None
    vocabulary, kind = int(str(logits.shape[2])), logits.dtype.numpy()
    none = nodes.number(vocabulary, np.int32)
    ids = nodes.add("Range", nodes.number(0, np.int32), none, nodes.number(1, np.int32))

    largest = nodes.add("ReduceMax", logits, nodes.numbers(2), keepdims=1)
    real = nodes.add("Greater", logits, nodes.number(-np.inf, kind))
    wins = nodes.add("And", nodes.add("Equal", logits, largest), real)
    first = nodes.add("ReduceMin", nodes.add("Where", wins, ids, none), nodes.numbers(1, 2), keepdims=0)

    below = nodes.add("Less", logits, nodes.number(np.inf, kind))  # false for a NaN
    all_below = nodes.add("ReduceMin", nodes.cast(below, ir.DataType.INT32), nodes.numbers(1, 2), keepdims=0)
    good = nodes.add("And", nodes.add("Less", first, none), nodes.cast(all_below, ir.DataType.BOOL))

    token = nodes.cast(nodes.add("Where", good, first, nodes.number(-1, np.int32)), ir.DataType.INT64)
    token.name, token.type = "greedy_token", ir.TensorType(ir.DataType.INT64)
    token.shape = ir.Shape(logits.shape[:1])
    nodes.graph.outputs.append(token)
