"""A rewrite of `Attention` to the layout with merged heads, [B, S, H Dh], and with the cache inside.

Transformers splits the heads first, [B, H, S, Dh], and concatenates the cache outside the operator. ONNX
Runtime's `Attention` can do both itself; TensorRT's cannot. A layer of Llama has 16 operators after the
rewrite instead of 26, and is a little faster on a CPU.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["merge_heads"]


def merge_heads(model: ir.Model) -> None:
    """Rewrite, in place, every `Attention` whose surroundings are as transformers writes them."""
    for node in list(model.graph):
        if node.op_type == "Attention" and len(node.outputs) == 1:
            _Merge(model.graph, node).apply()
    RemoveUnusedNodesPass()(model)


class _Merge:
    """The rewrite of one `Attention` with query [B, H, S, Dh], and key and value [B, Hkv, P + S, Dh]."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph = graph
        self._node = node
        self._new: list[ir.Node] = []

    def apply(self) -> None:
        """Rewrite the operator, or leave it as it is if its surroundings do not match."""
        query, key, value = self._node.inputs[:3]
        split = self._merged_output()
        caches = [_cache_concat(key), _cache_concat(value)]
        if split is None or any(caches) != all(caches):
            return
        past = [cache.inputs[0] for cache in caches if cache]
        if past:
            key, value = (cache.inputs[1] for cache in caches if cache)
        merged = [self._merged(one) for one in (query, key, value)]
        if not all(merged):
            return
        attributes = dict(self._node.attributes)
        for name, heads in (("q_num_heads", _num_heads(query)), ("kv_num_heads", _num_heads(key))):
            attributes[name] = ir.AttrInt64(name, heads)
        inputs = [*merged, *self._node.inputs[3:4]]
        if past:
            inputs += [None] * (4 - len(inputs)) + past
        made = ir.Node("", "Attention", inputs, list(attributes.values()), num_outputs=3 if past else 1)
        made.name = self._node.name
        self._graph.insert_before(self._node, [*self._new, made])
        _replace(split, made.outputs[0])
        for cache, output in zip(caches, made.outputs[1:], strict=False):
            assert cache is not None
            _replace(cache.outputs[0], output)

    def _merged_output(self) -> ir.Value | None:
        """Return the value that holds the output with merged heads, [B, S, H Dh]; None without a match."""
        transpose = _consumer(self._node.outputs[0], "Transpose")
        if transpose is None or not _swaps_heads_and_tokens(transpose):
            return None
        reshape = _consumer(transpose.outputs[0], "Reshape")
        found = reshape.outputs[0] if reshape else None
        return found if found is not None and len(found.shape or ()) == 3 else None

    def _merged(self, value: ir.Value | None) -> ir.Value | None:
        """Return a value [B, H, S, Dh] with its heads merged, [B, S, H Dh]; None without a match."""
        if value is None or _num_heads(value) == 0:
            return None
        rotary = _producer(value, "RotaryEmbedding")
        if rotary is not None:
            turned = self._merged(rotary.inputs[0])
            if turned is None:
                return None
            heads = ir.AttrInt64("num_heads", _num_heads(value))
            kept = [one for one in rotary.attributes.values() if one.name != heads.name]
            return self._add("RotaryEmbedding", [turned, *rotary.inputs[1:]], [*kept, heads], value)
        transpose = _producer(value, "Transpose")
        if transpose is None or not _swaps_heads_and_tokens(transpose):
            return None
        split = transpose.inputs[0]  # [B, S, H, Dh]
        assert split is not None
        reshape = _producer(split, "Reshape")
        whole = reshape.inputs[0] if reshape else None
        if whole is not None and len(whole.shape or ()) == 3:
            return whole
        sizes = ir.Value(
            name=f"{split.name}.merged_shape",
            const_value=ir.tensor([0, 0, -1], dtype=ir.DataType.INT64, name=f"{split.name}.merged_shape"),
        )
        self._graph.register_initializer(sizes)
        return self._add("Reshape", [split, sizes], [], value)

    def _add(
        self, kind: str, inputs: list[ir.Value | None], attributes: list[ir.Attr], old: ir.Value
    ) -> ir.Value:
        """Add a node that computes the old value with merged heads; return its output."""
        node = ir.Node("", kind, inputs, attributes)
        node.outputs[0].name = f"{old.name}.merged"
        node.outputs[0].type = old.type
        self._new.append(node)
        return node.outputs[0]


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Let all readers of the old value read the new one, and give it the old one's name."""
    new.type, new.shape = old.type, old.shape
    name, old.name = old.name, f"{old.name}.before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Return the node that computes a value if it is of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _cache_concat(value: ir.Value | None) -> ir.Node | None:
    """Return the node that appends to a layer's cache, if only this attention reads its output."""
    node = _producer(value, "Concat")
    past = node.inputs[0] if node is not None else None
    alone = node is not None and len(node.outputs[0].consumers()) == 1
    return node if alone and past is not None and past.is_graph_input() else None


def _consumer(value: ir.Value, kind: str) -> ir.Node | None:
    """Return the node that reads a value if it is the only one and of this kind."""
    readers = list(value.consumers())
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None


def _swaps_heads_and_tokens(transpose: ir.Node) -> bool:
    """Return whether a `Transpose` swaps the axes of heads and tokens."""
    return list(transpose.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _num_heads(value: ir.Value | None) -> int:
    """Return H of a value [B, H, S, Dh]; 0 if it is not known."""
    shape = value.shape if value is not None else None
    heads = shape[1] if shape is not None and len(shape) == 4 else 0
    return heads if isinstance(heads, int) else 0
