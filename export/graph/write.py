"""Write a traced graph with its weights beside it, one tensor at a time.

A weight is read from the checkpoint, converted, transposed where the graph asks for it, written, and
forgotten. Peak memory is a few tensors, not a model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from visprune.errors import UnsupportedError
from visprune.export.graph.trace import named_tensors
from visprune.manifest import Graph, TensorSpec

if TYPE_CHECKING:
    from visprune.export.checkpoint.weights import Weights

__all__ = ["graph_spec", "write_graph"]

# Onnx writes newer versions by now; released ONNX Runtimes (1.23, the last for Python 3.10) read 10.
IR_VERSION = 10
# Smaller tensors stay inside the .onnx file, where graph optimisers can see them.
_EXTERNAL_BYTES = 1024


def write_graph(
    model: ir.Model,
    module: nn.Module,
    weights: Weights,
    folder: Path,
    name: str,
    progress: Callable[[int], None],
) -> Graph:
    """Attach weights and write `onnx/<name>.onnx` with `onnx/<name>.onnx_data`.

    Args:
        model: From `trace`.
        module: The one whose parameters the graph's extra inputs are named after.
        weights: The values of these.
        folder: The bundle's directory.
        name: Of the graph.
        progress: Called with the bytes of each tensor written.

    Raises:
        UnsupportedError: A weight does not fit the graph's dtype.
    """
    _attach(model, named_tensors(module), weights)
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
        value.const_value = None  # the tracer keeps its last graph; it must not keep the module
    return Graph(
        file=f"onnx/{name}.onnx",
        data=f"onnx/{data}" if (folder / "onnx" / data).is_file() else None,
        inputs=tuple(graph_spec(value) for value in model.graph.inputs),
        outputs=tuple(graph_spec(value) for value in model.graph.outputs),
    )


def _attach(model: ir.Model, tensors: dict[str, Tensor], weights: Weights) -> None:
    """Make initialisers of the inputs that are weights, transposed where that is their only use."""
    graph = model.graph
    for value in [v for v in graph.inputs if v.name in tensors]:
        graph.inputs.remove(value)
        tensor = tensors[str(value.name)]
        for node in [use.node for use in value.uses()]:
            perm = node.attributes.get("perm") if node.op_type == "Transpose" else None
            if perm is None or list(perm.as_ints()) != [1, 0]:
                continue
            name = f"{value.name}.T"
            if name not in graph.initializers:
                turned = ir.Value(name=name, type=value.type, shape=ir.Shape(tuple(reversed(tensor.shape))))
                _initialise(graph, turned, tensor, weights, transpose=True)
            node.outputs[0].replace_all_uses_with(graph.initializers[name])
            graph.remove(node, safe=True)
        if value.uses():
            value.shape = ir.Shape(tuple(tensor.shape))
            _initialise(graph, value, tensor, weights, transpose=False)


def _initialise(
    graph: ir.Graph, value: ir.Value, tensor: Tensor, weights: Weights, *, transpose: bool
) -> None:
    """Give a value its weight, which is read each time it is looked at and kept by nobody."""
    name, dtype, shape = str(value.name), value.dtype, value.shape
    if dtype is None or not isinstance(shape, ir.Shape):
        raise UnsupportedError(f"The graph does not say the type of {name!r}.", "Report this as a bug.")

    def read() -> ir.TensorProtocol:
        stored = weights.read(tensor)
        # Turned by PyTorch, which takes a quarter of the time that NumPy takes.
        return ir.tensor(_array(name, stored.t() if transpose else stored, dtype), name=name)

    value.const_value = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
    graph.register_initializer(value)


def _array(name: str, tensor: Tensor, dtype: ir.DataType) -> np.ndarray:
    """The weight in the graph's dtype, checked to have survived the conversion."""
    wanted = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}.get(dtype)
    if wanted is not None and tensor.dtype != wanted:
        converted = tensor.to(wanted)
        if wanted is torch.float16 and not bool(torch.isfinite(converted).all()):
            largest = float(tensor.float().abs().max())
            raise UnsupportedError(
                f"The weight {name} reaches {largest:.4g}, and float16 ends at 65504.",
                "Export with --dtype fp32.",
            )
        tensor = converted
    array: np.ndarray = tensor.contiguous().numpy()
    return array


def graph_spec(value: ir.Value) -> TensorSpec:
    """An input or output as the manifest tells of it."""
    if value.dtype is None or value.shape is None or value.name is None:
        raise UnsupportedError(f"The tracer lost the type of {value.name!r}.", "Report this as a bug.")
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, dims)
