"""From a weightless module to an optimised ONNX graph whose weights are still names.

Weights are graph inputs while the optimiser runs: it cannot fold what it cannot see, so nothing of
their size is ever held. `write.py` turns them into initialisers that are read as they are written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

__all__ = ["GraphInput", "is_small", "named_tensors", "trace"]

# Larger tensors stay out of the graph until it is written; smaller ones may be folded.
_SMALL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One input: a shape to trace with, and the names of its dynamic dimensions."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: dict[int, str]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter off the user's terminal; its exceptions still pass."""
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
        module: The same module of the checkpoint.
        weights: The values of its parameters; small ones are read here.
        inputs: In the order of `forward`; a list stands for a list argument.
        outputs: Names in order, each with the names of its dynamic dimensions.
        target: Flavour and opset.
        fake: The mode the skeleton was made in.

    Returns:
        A graph whose large weights are inputs named like the module's parameters. An input that nothing
        reads is left out.
    """
    flat = [leaf for item in inputs for leaf in (item if isinstance(item, list) else [item])]
    with _quiet(), torch.no_grad(), fake:
        examples = [
            [torch.zeros(i.shape, dtype=i.dtype) for i in item]
            if isinstance(item, list)
            else torch.zeros(item.shape, dtype=item.dtype)
            for item in inputs
        ]
        program = torch.onnx.export(
            skeleton,
            tuple(examples),
            dynamo=True,
            optimize=False,
            opset_version=max(target.opset, 18),
            dynamic_shapes=tuple(
                [i.dims for i in item] if isinstance(item, list) else item.dims for item in inputs
            ),
            input_names=[i.name for i in flat],
            output_names=list(outputs),
            verbose=False,
        )
    if program is None:
        raise ExportError("The tracer gave no graph.", "Install torch 2.9 to 2.14.")
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
    # The tracer makes up names and expressions for dynamic dimensions; the glossary's read better.
    named = [*zip(model.graph.outputs, outputs.values(), strict=True)]
    named += [(value, leaf.dims) for value, leaf in zip(model.graph.inputs, flat, strict=False)]
    for value, dims in named:
        value.shape = ir.Shape([dims.get(axis, dim) for axis, dim in enumerate(value.shape or ())])
    for value in [v for v, _ in named if v.is_graph_input() and not v.uses()]:
        model.graph.inputs.remove(value)  # offered to a method that does not look at it
    return model


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they have in a trace, shared ones under each of theirs."""
    tensors: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    return tensors | dict(module.named_parameters(remove_duplicate=False))


def is_small(tensor: Tensor) -> bool:
    """Whether a weight is part of the graph while it is optimised, where its values may be folded."""
    return tensor.nbytes <= _SMALL_BYTES and tensor.dim() < 2


def _lift_weights(model: ir.Model, tensors: dict[str, Tensor], weights: Weights) -> None:
    """Turn initialisers into graph inputs, except small ones, which get their values now."""
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
    """Drop the tracer's notes (stack traces, paths of this machine) from the graph."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
