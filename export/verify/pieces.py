"""Take a written decoder graph apart, so that one layer of it runs and the rest stays on disk.

Nothing here knows how a layer is spelled. A layer's matrices are found by their names; it begins and ends
where everything that the graph computes of its input goes through one value: the residual stream. So it
holds for every flavour.
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
from visprune.export.graph.segments import attention_layers
from visprune.export.graph.write import graph_spec
from visprune.export.verify.compare import Arrays, Graphs

__all__ = ["DecoderGraph", "Piece"]

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Of the data, these see only how much of it there is.
_SHAPE_ONLY = ("Shape", "Size")


@dataclass(frozen=True, slots=True)
class Piece:
    """A layer, a half of one, or the norm and the head at the end.

    Attributes:
        name: For people.
        span: Its half layers, see `segments`; empty for norm and head.
        start: The value that enters it.
        outputs: What it computes: the value that leaves it first, then the present of its layer, and last the
            scores if there are any.
    """

    name: str
    span: range
    start: ir.Value
    outputs: tuple[ir.Value, ...]


class DecoderGraph:
    """One decoder graph of a bundle, its weights left in their file.

    Args:
        bundle: Complete but for its parity result.
        name: Of the graph.
        span: The half layers in it.

    Attributes:
        pieces: In their order.
        past: Names of the inputs that are its cache.

    Raises:
        ExportError: Its layers cannot be told apart.
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
        ends = _ends(name, graph, source, target)
        layers = sorted({half // 2 for half in span})
        if list(ends) != layers:
            raise _entangled(name)
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
        """A function that runs one piece; it takes the stream under the name of the value that enters it.

        The piece lies beside the graph while it is open, because only there may it refer to its weights.
        """
        graph, start = self._model.graph, piece.start
        for value in (start, piece.outputs[0]):
            if not value.is_graph_input() and not value.is_graph_output():  # where none has to be told
                value.type, value.shape = self._stream.type, self._stream.shape
        inputs = [start, *_other_inputs(start, piece.outputs)]
        cut = ir.Model(convenience.extract(graph, inputs, piece.outputs), ir_version=self._model.ir_version)
        whole = self._bundle.manifest.graphs[self._name]
        part = replace(
            whole,
            file=f"{whole.file}.piece",
            inputs=tuple(graph_spec(value) for value in cut.graph.inputs),
            outputs=tuple(graph_spec(value) for value in cut.graph.outputs),
        )
        file = self._bundle.path / part.file
        manifest = replace(self._bundle.manifest, graphs={piece.name: part})
        try:
            ir.save(cut, file)
            with Graphs(Bundle(self._bundle.path, manifest), low_memory=True).opened(piece.name) as run:
                yield run
        finally:
            file.unlink(missing_ok=True)


def _ends(name: str, graph: ir.Graph, source: ir.Value, target: ir.Value) -> dict[int, ir.Value]:
    """For each layer the value that leaves it.

    Raises:
        ExportError: Two layers have no one value between them.
    """
    nodes = _before(graph, target)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            # Norms do not count: equal ones of two layers may have become one.
            if value is None or not value.is_initializer() or len(value.shape or ()) < 2:
                continue
            if match := _LAYER.search(str(value.name)):
                last[int(match[1])] = index
                first.setdefault(int(match[1]), index)
    narrow = _narrow(nodes, source, target)
    ends = {}
    for layer, begin in sorted(last.items()):
        found = next((index for index in sorted(narrow) if index >= begin), len(nodes))
        if found >= first.get(layer + 1, len(nodes)):
            raise _entangled(name)
        ends[layer] = narrow[found]
    return ends


def _entangled(name: str) -> ExportError:
    return ExportError(
        f"The layers of {name} cannot be told apart, to be compared one by one.",
        "Compare all of it with --verify whole, or nothing with --no-verify.",
    )


def _before(graph: ir.Graph, target: ir.Value) -> list[ir.Node]:
    """The nodes that a value depends on, in the order of the graph."""
    needed: set[ir.Node] = set()
    stack = [target.producer()]
    while stack:
        node = stack.pop()
        if node is not None and node not in needed:
            needed.add(node)
            stack += [value.producer() for value in node.inputs if value is not None]
    return [node for node in graph if node in needed]


def _narrow(nodes: Sequence[ir.Node], source: ir.Value, target: ir.Value) -> dict[int, ir.Value]:
    """After which nodes one value alone has all that later nodes take of the source, and which value."""
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
    """What else of the graph's inputs some outputs depend on, once a value is given."""
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
