"""Write a traced graph with its weights beside it, one tensor at a time.

A weight is read from the checkpoint's memory-mapped file, converted, transposed where the graph
asks for it, written, and forgotten. Peak memory is a few tensors, not a model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from visprune.errors import UnsupportedError
from visprune.export.trace import named_tensors
from visprune.manifest import Graph, TensorSpec

__all__ = ["write_graph"]

# Onnx writes newer versions by now; released ONNX Runtimes (1.23, the last for Python 3.10) read 10.
IR_VERSION = 10
# Smaller tensors stay inside the .onnx file, where graph optimisers can see them.
_EXTERNAL_BYTES = 1024


def write_graph(
    model: ir.Model, weights: nn.Module, folder: Path, name: str, progress: Callable[[int], None]
) -> Graph:
    """Attach weights and write `onnx/<name>.onnx` with `onnx/<name>.onnx_data`.

    Args:
        model: From `trace`.
        weights: The module whose parameters the graph's extra inputs are named after.
        folder: The bundle's directory.
        name: Of the graph.
        progress: Called with the bytes of each tensor written.

    Raises:
        UnsupportedError: A weight does not fit the graph's dtype.
    """
    _attach(model, weights)
    model.ir_version = IR_VERSION
    model.producer_name = "visprune"
    model.graph.name = name
    (folder / "onnx").mkdir(exist_ok=True)
    data = f"{name}.onnx_data"
    ir.save(
        model,
        folder / "onnx" / f"{name}.onnx",
        external_data=data,
        size_threshold_bytes=_EXTERNAL_BYTES,
        callback=lambda tensor, _: progress(tensor.nbytes),
    )
    for value in model.graph.initializers.values():
        value.const_value = None  # the tracer keeps its last graph; it must not keep the checkpoint mapped
    return Graph(
        file=f"onnx/{name}.onnx",
        data=f"onnx/{data}" if (folder / "onnx" / data).is_file() else None,
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
    )


def _attach(model: ir.Model, weights: nn.Module) -> None:
    """Make initialisers of the inputs that are weights, transposed where that is their only use."""
    graph = model.graph
    tensors = named_tensors(weights)
    for value in [v for v in graph.inputs if v.name in tensors]:
        graph.inputs.remove(value)
        tensor = tensors[str(value.name)]
        for node in [use.node for use in value.uses()]:
            perm = node.attributes.get("perm") if node.op_type == "Transpose" else None
            if perm is None or list(perm.as_ints()) != [1, 0]:
                continue
            turned = node.outputs[0]
            name = f"{value.name}.T"
            if name not in graph.initializers:
                _initialise(graph, name, tensor, value.dtype, transpose=True)
            turned.replace_all_uses_with(graph.initializers[name])
            graph.remove(node, safe=True)
        if value.uses():
            _initialise(graph, str(value.name), tensor, value.dtype, transpose=False, value=value)


def _initialise(
    graph: ir.Graph,
    name: str,
    tensor: Tensor,
    dtype: ir.DataType | None,
    *,
    transpose: bool,
    value: ir.Value | None = None,
) -> None:
    if dtype is None:
        raise UnsupportedError(f"The graph does not say the type of {name!r}.", "Report this as a bug.")
    shape = ir.Shape(tuple(reversed(tensor.shape)) if transpose else tuple(tensor.shape))
    wanted = dtype

    def read() -> ir.TensorProtocol:
        return ir.tensor(_array(name, tensor.t() if transpose else tensor, wanted), name=name)

    lazy = ir.LazyTensor(read, dtype=wanted, shape=shape, name=name)
    if value is None:
        value = ir.Value(name=name, type=ir.TensorType(wanted), shape=shape)
    value.const_value = lazy
    graph.register_initializer(value)


def _array(name: str, tensor: Tensor, dtype: ir.DataType) -> np.ndarray:
    """The weight in the graph's dtype, checked to have survived the conversion."""
    wanted = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}.get(dtype)
    detached = tensor.detach()
    if wanted is not None and detached.dtype != wanted:
        converted = detached.to(wanted)
        if wanted is torch.float16 and not bool(torch.isfinite(converted).all()):
            largest = float(detached.float().abs().max())
            raise UnsupportedError(
                f"The weight {name} reaches {largest:.4g}, and float16 ends at 65504.",
                "Export with --dtype fp32.",
            )
        detached = converted
    array: np.ndarray = detached.contiguous().numpy()
    return array


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None or value.name is None:
        raise UnsupportedError(f"The tracer lost the type of {value.name!r}.", "Report this as a bug.")
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, dims)
