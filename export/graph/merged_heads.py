"""Attention of tokens with their heads side by side, [B, S, H Dh], that appends to the cache itself.

transformers lays heads out first, [B, H, S, Dh], and concatenates the cache outside. ONNX Runtime's
`Attention` does both by itself; TensorRT's does not. A layer of Llama has 16 operators this way instead of
26, and is a little faster on a CPU.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["merge_heads"]


def merge_heads(model: ir.Model) -> None:
    """Change every `Attention` whose surroundings are as transformers writes them; others stay."""
    for node in list(model.graph):
        if node.op_type == "Attention" and len(node.outputs) == 1:
            _Merge(model.graph, node).apply()
    RemoveUnusedNodesPass()(model)


class _Merge:
    """One `Attention`: query [B, H, S, Dh], key and value [B, Hkv, P + S, Dh]."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph = graph
        self._node = node
        self._new: list[ir.Node] = []

    def apply(self) -> None:
        """Change it if all of its surroundings are known."""
        query, key, value = self._node.inputs[:3]
        split = self._split_again()
        caches = [_cache(key), _cache(value)]
        if split is None or any(caches) != all(caches):
            return
        past = [cache.inputs[0] for cache in caches if cache]
        if past:
            key, value = (cache.inputs[1] for cache in caches if cache)
        merged = [self._merged(one) for one in (query, key, value)]
        if not all(merged):
            return
        attributes = dict(self._node.attributes)
        for name, heads in (("q_num_heads", _heads(query)), ("kv_num_heads", _heads(key))):
            attributes[name] = ir.AttrInt64(name, heads)
        inputs = [*merged, *self._node.inputs[3:4]]
        if past:
            inputs += [None] * (4 - len(inputs)) + past
        made = ir.Node("", "Attention", inputs, list(attributes.values()), num_outputs=3 if past else 1)
        made.name = self._node.name
        self._graph.insert_before(self._node, [*self._new, made])
        _take_over(split, made.outputs[0])
        for cache, output in zip(caches, made.outputs[1:], strict=False):
            assert cache is not None
            _take_over(cache.outputs[0], output)

    def _split_again(self) -> ir.Value | None:
        """Where what comes out is laid out as the tokens are, [B, S, H Dh]."""
        transpose = _consumer(self._node.outputs[0], "Transpose")
        reshape = _consumer(transpose.outputs[0], "Reshape") if transpose and _swaps(transpose) else None
        found = reshape.outputs[0] if reshape else None
        return found if found is not None and len(found.shape or ()) == 3 else None

    def _merged(self, value: ir.Value | None) -> ir.Value | None:
        """A value [B, H, S, Dh] with its heads side by side."""
        if value is None or _heads(value) == 0:
            return None
        rotary = _producer(value, "RotaryEmbedding")
        if rotary is not None:
            turned = self._merged(rotary.inputs[0])
            if turned is None:
                return None
            heads = ir.AttrInt64("num_heads", _heads(value))
            kept = [one for one in rotary.attributes.values() if one.name != heads.name]
            return self._add("RotaryEmbedding", [turned, *rotary.inputs[1:]], [*kept, heads], value)
        transpose = _producer(value, "Transpose")
        if transpose is None or not _swaps(transpose):
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
        """A node whose output is the old value, merged."""
        node = ir.Node("", kind, inputs, attributes)
        node.outputs[0].name = f"{old.name}.merged"
        node.outputs[0].type = old.type
        self._new.append(node)
        return node.outputs[0]


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Everything that read the old value reads the new one, which has its name."""
    new.type, new.shape = old.type, old.shape
    name, old.name = old.name, f"{old.name}.before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _cache(value: ir.Value | None) -> ir.Node | None:
    """What appends to the cache of a layer, for this attention alone."""
    node = _producer(value, "Concat")
    past = node.inputs[0] if node is not None else None
    alone = node is not None and len(node.outputs[0].consumers()) == 1
    return node if alone and past is not None and past.is_graph_input() else None


def _consumer(value: ir.Value, kind: str) -> ir.Node | None:
    """The only reader."""
    readers = list(value.consumers())
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None


def _swaps(transpose: ir.Node) -> bool:
    """Whether it swaps heads and tokens."""
    return list(transpose.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _heads(value: ir.Value | None) -> int:
    """Of [B, H, S, Dh]; 0 if they are not known."""
    shape = value.shape if value is not None else None
    heads = shape[1] if shape is not None and len(shape) == 4 else 0
    return heads if isinstance(heads, int) else 0
