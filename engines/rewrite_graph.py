"""The form of a graph that is built into an engine: one integer a token, and the cache written in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from visprune.engines.in_place import write_in_place
from visprune.engines.nodes import Nodes
from visprune.errors import BundleError

__all__ = ["prepare"]


def prepare(onnx: Path, *, cache_capacity: int) -> Path:
    """Write the form of a graph that is built, beside it; weights stay in the file that they are in.

    A graph with `logits` [B, 1, V] gets one more output, `greedy_token` [B] int64: the index of the largest,
    the lowest at ties; -1 where there is a NaN or +inf, or nothing but -inf.

    With a capacity C the cache of a decoder is written in place:

        past_key_values.{i}.key   [1, Hkv, C, Dh]   and .value: buffers; finite everywhere, also where unused
        cache_length              [1] int64         P, the tokens that they hold; P + S <= C
        present.{i}.key           [1, Hkv, C, Dh]   and .value: the same buffers, written from P on. TensorRT
                                                    wants them at the addresses of their inputs

    Args:
        onnx: A graph of the exporter's, quantized or not.
        cache_capacity: C; 0 leaves the cache as it is.

    Returns:
        The file written; `onnx` where nothing is changed.

    Raises:
        EngineError: The graph has no cache, or reads it in a way that is not known.
        BundleError: The file is no graph.
    """
    try:
        model = ir.load(onnx)
    except Exception as error:  # protobuf's own
        raise BundleError(
            f"{onnx.name} is no ONNX graph.", "Copy the bundle again, or export it again."
        ) from error
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if logits is None and cache_capacity == 0:
        return onnx
    nodes = Nodes(model.graph)
    if logits is not None:
        _put_out_token(nodes, logits)
    if cache_capacity > 0:
        write_in_place(model, nodes, onnx.stem, cache_capacity)
    model.graph.sort()
    made = onnx.with_suffix(f".engine{cache_capacity}.onnx")
    ir.save(model, made)
    return made


def _put_out_token(nodes: Nodes, logits: ir.Value) -> None:
    """Add `greedy_token`. Not by `ArgMax`: what TensorRT does at ties and NaNs is not documented."""
    assert logits.shape is not None
    assert logits.dtype is not None
    vocabulary, kind = int(str(logits.shape[2])), logits.dtype.numpy()
    none = nodes.number(vocabulary, np.int32)
    ids = nodes.add("Range", nodes.number(0, np.int32), none, nodes.number(1, np.int32))

    largest = nodes.add("ReduceMax", logits, nodes.numbers(2), keepdims=1)
    real = nodes.add("Greater", logits, nodes.number(-np.inf, kind))
    wins = nodes.add("And", nodes.add("Equal", logits, largest), real)
    first = nodes.add("ReduceMin", nodes.add("Where", wins, ids, none), nodes.numbers(1, 2), keepdims=0)

    below = nodes.add("Less", logits, nodes.number(np.inf, kind))  # a NaN is not
    all_below = nodes.add("ReduceMin", nodes.cast(below, ir.DataType.INT32), nodes.numbers(1, 2), keepdims=0)
    good = nodes.add("And", nodes.add("Less", first, none), nodes.cast(all_below, ir.DataType.BOOL))

    token = nodes.cast(nodes.add("Where", good, first, nodes.number(-1, np.int32)), ir.DataType.INT64)
    token.name, token.type = "greedy_token", ir.TensorType(ir.DataType.INT64)
    token.shape = ir.Shape(logits.shape[:1])
    nodes.graph.outputs.append(token)
