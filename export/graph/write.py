"""Writing of a traced graph and the file of its weights, one tensor at a time.

A weight is read from the checkpoint, converted, transposed if the graph needs it so, written, and released.
The peak of memory is a few tensors and not a model.
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

__all__ = ["tensor_spec", "write_graph"]

# Current versions of onnx write newer IR versions, but ONNX Runtime 1.23, the last for Python 3.10, reads 10.
IR_VERSION = 10
# Tensors below this size stay inside the .onnx file, where graph optimisers can see them.
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
        model: The graph from `trace`.
        module: The module after whose parameters the graph's additional inputs are named.
        weights: The values of these parameters.
        folder: The bundle's directory.
        name: Name of the graph.
        progress: Called with the number of bytes of each tensor that is written.

    Returns:
        The manifest's entry for the graph.

    Raises:
        UnsupportedError: A weight is outside the range of the graph's dtype.
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
        value.const_value = None  # the tracer keeps its last graph, which would keep the module alive
    return Graph(
        file=f"onnx/{name}.onnx",
        data=f"onnx/{data}" if (folder / "onnx" / data).is_file() else None,
        inputs=tuple(tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in model.graph.outputs),
    )


def _attach(model: ir.Model, tensors: dict[str, Tensor], weights: Weights) -> None:
    """Turn inputs that are weights into initialisers, transposed where a `Transpose` would read them."""
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
    """Give a value its weight as a lazy tensor, which is read on each access and never kept."""
    name, dtype, shape = str(value.name), value.dtype, value.shape
    if dtype is None or not isinstance(shape, ir.Shape):
        raise UnsupportedError(f"The graph lacks the type of {name!r}.", "Report this as a bug.")

    def read() -> ir.TensorProtocol:
        stored = weights.read(tensor)
        # PyTorch transposes, because it takes a quarter of the time that NumPy takes.
        return ir.tensor(_array(name, stored.t() if transpose else stored, dtype), name=name)

    value.const_value = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
    graph.register_initializer(value)


def _array(name: str, tensor: Tensor, dtype: ir.DataType) -> np.ndarray:
    """Return a weight in the graph's dtype.

    Raises:
        UnsupportedError: The weight exceeds the range of float16.
    """
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


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Return the manifest's entry for an input or output of a graph."""
    if value.dtype is None or value.shape is None or value.name is None:
        raise UnsupportedError(f"The tracer lost the type of {value.name!r}.", "Report this as a bug.")
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, dims)
