"""Splitting of a written decoder graph into layers, so that one layer runs while the others stay on disk.

The split does not depend on how a layer is written, so it works for every flavour. A layer's matrices are
found by their names. A layer begins and ends where everything that the graph has computed from its input goes
through a single value, which is the residual stream.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir import convenience

from visprune.bundle import Bundle
from visprune.errors import ExportError
from visprune.export.graph.segments import attention_layers, span_layers
from visprune.export.graph.write import tensor_spec
from visprune.export.verify.compare import Arrays, GraphRunner

__all__ = ["DecoderGraph", "Piece"]

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Operators that read only the shape of their input and not its values.
_SHAPE_ONLY = ("Shape", "Size")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a decoder graph: a layer, half a layer, or the final norm with the head.

    Attributes:
        name: Name for the report.
        span: Its half layers (see `segments`); empty for the norm with the head.
        start: The value of the residual stream that enters it.
        outputs: Its outputs: first the value of the residual stream that leaves it, then the present key and
            value of its layer, and last the scores, if there are any.
    """

    name: str
    span: range
    start: ir.Value
    outputs: tuple[ir.Value, ...]


class DecoderGraph:
    """One decoder graph of a bundle, split into pieces; its weights stay in their file.

    Args:
        bundle: A bundle that is complete except for its parity result.
        name: Name of the graph.
        span: The half layers in the graph.

    Attributes:
        pieces: The pieces, in the order in which they run.
        past: Names of the graph's cache inputs.

    Raises:
        ExportError: The layers cannot be told apart.
    """

    def __init__(self, bundle: Bundle, name: str, span: range) -> None:
        self._bundle = bundle
        self._name = name
        self._model = ir.load(bundle.file(bundle.manifest.graphs[name].file))
        graph = self._model.graph
        outputs = {str(value.name): value for value in graph.outputs}
        source = next(value for value in graph.inputs if value.name in ("inputs_embeds", "hidden_states"))
        is_last = "logits" in outputs
        target = outputs["logits" if is_last else "last_hidden_state"]
        self._stream = source
        self.past = tuple(str(value.name) for value in graph.inputs if "past" in str(value.name))
        ends = _layer_outputs(name, graph, source, target)
        layers = span_layers(span)
        if list(ends) != layers:
            raise _inseparable_error(name)
        self.pieces: list[Piece] = []
        for layer, end in ends.items():
            halves = range(max(span.start, 2 * layer), min(span.stop, 2 * layer + 2))
            kind = "" if len(halves) == 2 else " MLP" if halves.start % 2 else " attention"
            made = [end if is_last or layer != layers[-1] else target]
            if layer in attention_layers(halves):
                made += [outputs[f"present.{layer}.{what}"] for what in ("key", "value")]
            if layer == layers[-1] and "token_scores" in outputs:
                made.append(outputs["token_scores"])
            self.pieces.append(Piece(f"{name} layer {layer}{kind}", halves, source, tuple(made)))
            source = made[0]
        if is_last:
            self.pieces.append(Piece(f"{name} norm and head", range(0), source, (target,)))

    @contextlib.contextmanager
    def opened(self, piece: Piece) -> Iterator[Callable[[Arrays], Arrays]]:
        """Open one piece; yield a function that runs it.

        The function takes the residual stream under the name of `piece.start`. While the piece is open its
        file is in the graph's directory, because only there may it refer to the graph's weights.
        """
        graph, start = self._model.graph, piece.start
        for value in (start, piece.outputs[0]):
            # Inputs and outputs of the graph have a type and a shape already.
            if not value.is_graph_input() and not value.is_graph_output():
                value.type, value.shape = self._stream.type, self._stream.shape
        inputs = [start, *_other_inputs(start, piece.outputs)]
        cut = ir.Model(convenience.extract(graph, inputs, piece.outputs), ir_version=self._model.ir_version)
        whole = self._bundle.manifest.graphs[self._name]
        part = replace(
            whole,
            file=f"{whole.file}.piece",
            inputs=tuple(tensor_spec(value) for value in cut.graph.inputs),
            outputs=tuple(tensor_spec(value) for value in cut.graph.outputs),
        )
        file = self._bundle.path / part.file
        manifest = replace(self._bundle.manifest, graphs={piece.name: part})
        try:
            ir.save(cut, file)
            with GraphRunner(Bundle(self._bundle.path, manifest), low_memory=True).opened(piece.name) as run:
                yield run
        finally:
            file.unlink(missing_ok=True)


def _layer_outputs(name: str, graph: ir.Graph, source: ir.Value, target: ir.Value) -> dict[int, ir.Value]:
    """Return the value of the residual stream that leaves each layer.

    Raises:
        ExportError: Between two layers there is no point with a single value.
    """
    nodes = _ancestors(graph, target)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            # Norms are vectors and do not count: equal ones of two layers may have been merged into one.
            if value is None or not value.is_initializer() or len(value.shape or ()) < 2:
                continue
            if match := _LAYER.search(str(value.name)):
                last[int(match[1])] = index
                first.setdefault(int(match[1]), index)
    narrow = _single_values(nodes, source, target)
    ends = {}
    for layer, begin in sorted(last.items()):
        found = next((index for index in sorted(narrow) if index >= begin), len(nodes))
        if found >= first.get(layer + 1, len(nodes)):
            raise _inseparable_error(name)
        ends[layer] = narrow[found]
    return ends


def _inseparable_error(name: str) -> ExportError:
    return ExportError(
        f"The layers of {name} cannot be told apart, to be compared one by one.",
        "Compare all of it with --verify whole, or nothing with --no-verify.",
    )


def _ancestors(graph: ir.Graph, target: ir.Value) -> list[ir.Node]:
    """Return the nodes on which a value depends, in the order of the graph."""
    needed: set[ir.Node] = set()
    stack = [target.producer()]
    while stack:
        node = stack.pop()
        if node is not None and node not in needed:
            needed.add(node)
            stack += [value.producer() for value in node.inputs if value is not None]
    return [node for node in graph if node in needed]


def _single_values(nodes: Sequence[ir.Node], source: ir.Value, target: ir.Value) -> dict[int, ir.Value]:
    """Find the nodes after which a single value carries all data from the source that later nodes read.

    Returns:
        That value, by the index of the node.
    """
    data = {source}
    last_use = {target: len(nodes)}
    for index, node in enumerate(nodes):
        used = [] if node.op_type in _SHAPE_ONLY else [value for value in node.inputs if value in data]
        last_use |= {value: index for value in used if value is not None and value is not target}
        data |= set(node.outputs) if used else set()
    live, narrow = {source}, {}
    for index, node in enumerate(nodes):
        live |= {value for value in node.outputs if value in data}
        live = {value for value in live if last_use.get(value, index) > index}
        if len(live) == 1:
            (narrow[index],) = live
    return narrow


def _other_inputs(start: ir.Value, outputs: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the graph inputs, other than `start`, on which the outputs depend when `start` is given."""
    seen, found = {start}, []
    stack = [*outputs]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            found.append(value)
        elif (node := value.producer()) is not None:
            stack += [value for value in node.inputs if value is not None]
    return found
