"""Tracing of a weightless module into an optimised ONNX graph that names its weights but does not hold them.

Large weights are graph inputs while the optimiser runs. It cannot fold values that it does not see, so
nothing of their size is ever in memory. `write.py` turns them into initialisers that are read while they are
written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnxscript import optimizer, version_converter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from visprune.errors import ExportError
from visprune.export.graph.fusions import fuse
from visprune.export.graph.merged_heads import merge_heads

if TYPE_CHECKING:
    from visprune.export.checkpoint.weights import Weights
    from visprune.targets import Target

__all__ = ["GraphInput", "is_small", "map_inputs", "named_tensors", "trace"]

# Vectors of at most so many bytes get their values before the optimiser runs, so that it can fold them.
_SMALL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One input of a graph.

    Attributes:
        name: Its name.
        shape: An example of its shape, to trace with.
        dtype: Its dtype.
        dims: Names of its dynamic dimensions, by axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: dict[int, str]


def map_inputs(
    function: Callable[[GraphInput], Any], inputs: Sequence[GraphInput | list[GraphInput]]
) -> list[Any]:
    """Apply a function to every input; the result has lists where the inputs have lists."""
    return [[function(i) for i in item] if isinstance(item, list) else function(item) for item in inputs]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Silence the output, warnings and log of the exporter; its exceptions still pass."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def trace(
    skeleton: nn.Module,
    module: nn.Module,
    weights: Weights,
    inputs: Sequence[GraphInput | list[GraphInput]],
    outputs: Mapping[str, dict[int, str]],
    target: Target,
    fake: FakeTensorMode,
) -> ir.Model:
    """Trace a module into an ONNX graph.

    Args:
        skeleton: The module with fake weights in the target's dtype.
        module: The same module made of the checkpoint's parameters.
        weights: The values of these parameters; small ones are read here.
        inputs: In the order of `forward`; a list stands for an argument that is a list.
        outputs: Names in order, each with the names of its dynamic dimensions by axis.
        target: Decides flavour and opset.
        fake: The mode in which the skeleton was made.

    Returns:
        A graph whose large weights are inputs with the names of the module's parameters. Inputs that no
        operator reads are left out.

    Raises:
        ExportError: The tracer returned no graph.
    """
    flat = [leaf for item in inputs for leaf in (item if isinstance(item, list) else [item])]
    with _silenced(), torch.no_grad(), fake:
        examples = map_inputs(lambda i: torch.zeros(i.shape, dtype=i.dtype), inputs)
        program = torch.onnx.export(
            skeleton,
            tuple(examples),
            dynamo=True,
            optimize=False,
            opset_version=max(target.opset, 18),
            dynamic_shapes=tuple(map_inputs(lambda i: i.dims, inputs)),
            input_names=[i.name for i in flat],
            output_names=list(outputs),
            verbose=False,
        )
    if program is None:
        raise ExportError("The tracer returned no graph.", "Install torch 2.9 to 2.14.")
    model = program.model
    _lift_weights(model, named_tensors(module), weights)
    optimizer.optimize(model)
    if model.opset_imports[""] != target.opset:
        version_converter.convert_version(model, target.opset, fallback=True)
        optimizer.optimize(model)
    if target.flavour == "native":
        fuse(model)
        if not target.builds_engines:
            merge_heads(model)
    ir.passes.common.CommonSubexpressionEliminationPass()(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    _strip(model)
    # The tracer invents names and expressions for dynamic dimensions; the names of the glossary are clearer.
    named = [*zip(model.graph.outputs, outputs.values(), strict=True)]
    named += [(value, leaf.dims) for value, leaf in zip(model.graph.inputs, flat, strict=False)]
    for value, dims in named:
        value.shape = ir.Shape([dims.get(axis, dim) for axis, dim in enumerate(value.shape or ())])
    for value in [v for v, _ in named if v.is_graph_input() and not v.uses()]:
        model.graph.inputs.remove(value)  # the method does not read this input
    return model


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their names in a trace, shared ones under each of their names."""
    tensors: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    return tensors | dict(module.named_parameters(remove_duplicate=False))


def is_small(tensor: Tensor) -> bool:
    """Return whether a weight is a vector so small that its values may be folded by the optimiser."""
    return tensor.nbytes <= _SMALL_BYTES and tensor.dim() < 2


def _lift_weights(model: ir.Model, tensors: dict[str, Tensor], weights: Weights) -> None:
    """Turn initialisers into graph inputs, except small ones, whose values are read now."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name not in tensors or value.const_value is None:
            continue
        if is_small(tensors[name]):
            dtype = value.const_value.dtype
            tensor = weights.read(tensors[name])
            array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            value.const_value = ir.tensor(array.astype(dtype.numpy()), name=name)
            continue
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)


def _strip(model: ir.Model) -> None:
    """Remove the tracer's metadata (stack traces, paths of this machine) from the graph."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
