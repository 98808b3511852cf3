"""A rewrite of a decoder for ONNX Runtime, so that its cache is written in place.

The standard `Attention` returns the cache with the new tokens appended, so all of it is copied for every
token. `GroupQueryAttention` of ONNX Runtime writes the new tokens into the buffer that holds the old ones. It
is causal by itself, so the mask goes. The files of a bundle keep the standard operator; the rewrite is made
when a graph is loaded, and changes no weight.
"""

from __future__ import annotations

from typing import Any

from visprune.cache_names import PAST
from visprune.runtime.backends.onnx_messages import attribute, parse

__all__ = ["LENGTHS", "rewrite_cache"]

LENGTHS = ("cache.last_index", "cache.length")
"""Inputs of a rewritten graph, both [1] int32: index of the last token in the cache, and number of tokens
there, new ones included."""

_INT32 = 6  # TensorProto.DataType
_HEAD_UNIT = 8  # `GroupQueryAttention` refuses heads whose size is no multiple of this
_MICROSOFT = "com.microsoft"
_KNOWN = {"scale", "q_num_heads", "kv_num_heads"}  # attributes of `Attention` that are translated
# Operators that make the causal mask, from its last one; see `visprune.export.graph.layers.causal_mask`.
_MASK = ("Unsqueeze", "Where", "Greater")


def rewrite_cache(content: bytes, weights: tuple[str, str] | None = None) -> bytes | None:
    """Return a serialized model whose cache is written in place.

    Args:
        content: A serialized model.
        weights: The file of its external data as the model names it, and the name to replace that by.

    Returns:
        The rewritten model. None if it cannot be parsed, if not every layer's attention has the form that an
        export writes (merged heads, cache inside, causal mask) and a head size that the operator takes, if
        the cache is read elsewhere too, or if there is external data in another file.
    """
    try:
        model = parse(content)
    except (ImportError, ValueError):  # a protobuf too old, or a file that ONNX Runtime will refuse
        return None
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    caches = [value for value in graph.input if value.name.startswith(PAST)]
    past = {value.name for value in caches}
    if not all(_fits(value) for value in caches):
        return None
    layers = [node for node in graph.node if past & set(node.input[4:6])]
    if not layers or not all(_is_plain(node, made_by) for node in layers):
        return None
    for node in layers:
        _replace(node)
    _drop_unused(graph)
    present = {name for node in layers for name in node.output[1:]}
    inside = {name for node in layers for name in node.input[3:5]}
    read = [name for node in graph.node for name in node.input]
    if inside != past or present & set(read) or len(past) != sum(name in past for name in read):
        return None
    if weights is not None and not _rename_weights(graph, *weights):
        return None
    for name in LENGTHS:
        tensor = graph.input.add(name=name).type.tensor_type
        tensor.elem_type = _INT32
        tensor.shape.dim.add(dim_value=1)
    _largest_first(graph)
    if all(opset.domain != _MICROSOFT for opset in model.opset_import):
        model.opset_import.add(domain=_MICROSOFT, version=1)
    found: bytes = model.SerializeToString()
    return found


def _fits(cache: Any) -> bool:
    """Return whether the operator takes the head size of an input of the cache, [1, Hkv, P, Dh]."""
    dims = cache.type.tensor_type.shape.dim
    head_dim: int = dims[-1].dim_value if dims else 0
    return head_dim > 0 and head_dim % _HEAD_UNIT == 0


def _is_plain(node: Any, made_by: dict[str, Any]) -> bool:
    """Return whether a node is an `Attention` that `GroupQueryAttention` computes in the same way."""
    names = {one.name for one in node.attribute}
    if (node.op_type, node.domain) != ("Attention", "") or names != _KNOWN or len(node.input) != 6:
        return False
    mask = made_by.get(node.input[3])
    for kind in _MASK:
        if mask is None or mask.op_type != kind:
            return False
        mask = made_by.get(mask.input[0])
    return len(node.output) == 3


def _replace(node: Any) -> None:
    """Turn an `Attention` into a `GroupQueryAttention` with the same inputs and outputs."""
    found = {one.name: one for one in node.attribute}
    scale, heads, kv_heads = found["scale"].f, found["q_num_heads"].i, found["kv_num_heads"].i
    inputs = [*node.input[:3], *node.input[4:6], *LENGTHS]
    node.op_type, node.domain = "GroupQueryAttention", _MICROSOFT
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    attribute(node, "num_heads", heads)
    attribute(node, "kv_num_heads", kv_heads)
    attribute(node, "scale", scale)


def _rename_weights(graph: Any, old: str, new: str) -> bool:
    """Rename the file of external data. Return False if a tensor has its data in another file."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                if entry.value != old:
                    return False
                entry.value = new
    return True


def _largest_first(graph: Any) -> None:
    """Move the node with the largest weight, which is the output head of most models, before all others.

    ONNX Runtime copies weights in the order of nodes, and has both copies of one in memory meanwhile. The
    first is copied when little else is there, so that memory has no peak. The order changes no result:
    ONNX Runtime sorts nodes by what they read.
    """
    sizes = {
        tensor.name: int(entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "length" and entry.value.isdecimal()
    }
    largest = max(graph.node, key=lambda node: max((sizes.get(name, 0) for name in node.input), default=0))
    first = type(largest)()
    first.CopyFrom(largest)
    graph.node.remove(largest)
    graph.node.insert(0, first)


def _drop_unused(graph: Any) -> None:
    """Remove the nodes of which no output is used, such as those of the mask."""
    wanted = {value.name for value in graph.output}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if wanted & set(node.output):
            wanted |= set(node.input)
        else:
            del graph.node[index]
