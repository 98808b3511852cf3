"""The operators that TensorRT 10.3, that of JetPack 6, is documented to take, with types and restrictions.

Sources: the tables `docs/operators.md` of onnx/onnx-tensorrt for TensorRT 8.5 and 10.15, and the project's
`docs/Changelog.md` for what came between. Listed is what 8.5 takes and 10.15 still does, what the changelog
adds up to 10.3, INT64 wherever 8.5 has INT32 (added in 9.0), and nothing that came later: `Attention`
(10.14), `RMSNormalization`, `RotaryEmbedding` and `TensorScatter` (10.15), integer `Pow` (10.8), opset 18's
`ScatterND` (10.9), tensors for the axes of `Pad` (10.4), `Squeeze`, `Unsqueeze` (10.7) and `CumSum` (10.8).
Only operators that visprune has a use for are listed. It is no proof that a graph builds.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

OPSETS = range(9, 21)  # of TensorRT 10.0 to 10.3
TOPK_LIMIT = 3840

_FLOAT = {"FLOAT", "FLOAT16"}
_NUMBER = _FLOAT | {"INT32", "INT64"}
_ANY = _NUMBER | {"BOOL"}
_BOOL = {"BOOL"}

# Types of the data: of what `_data` names.
OPERATORS = {
    **dict.fromkeys(
        ["Abs", "Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Neg", "Range", "Sign"], _NUMBER
    ),
    **dict.fromkeys(["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "ArgMax"], _NUMBER),
    **dict.fromkeys(["And", "Or", "Not"], _BOOL),
    **dict.fromkeys(["Cast", "Concat", "Expand", "Identity", "Reshape", "Shape", "Slice", "Split"], _ANY),
    **dict.fromkeys(["Squeeze", "Transpose", "Unsqueeze", "Where", "Gather", "GatherElements"], _ANY),
    **dict.fromkeys(["Ceil", "Clip", "Conv", "Cos", "CumSum", "Erf", "Exp", "Floor", "Gemm", "Log"], _FLOAT),
    **dict.fromkeys(["LayerNormalization", "MatMul", "Pow", "Reciprocal", "Sigmoid", "Sin"], _FLOAT),
    **dict.fromkeys(["ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"], _FLOAT),
    **dict.fromkeys(["Scan", "Softmax", "Sqrt", "Tanh"], _FLOAT),
    "Pad": _NUMBER,
    "Resize": _FLOAT,
    "TopK": _FLOAT | {"INT32"},
    "QuantizeLinear": _FLOAT,
    "DequantizeLinear": {"INT8"},
}
# Inputs that have to be constants.
CONSTANTS = {
    **dict.fromkeys(["ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"], (1,)),
    **dict.fromkeys(["CumSum", "Squeeze", "Unsqueeze"], (1,)),
    **dict.fromkeys(["QuantizeLinear", "DequantizeLinear"], (1, 2)),
    "Conv": (1,),
    "Pad": (3,),
}
_INDICES = {
    "Gather": 1,
    "GatherElements": 1,
    "Reshape": 1,
    "Expand": 1,
    "Resize": 1,
    "Slice": 1,
    "Squeeze": 1,
    "Unsqueeze": 1,
}


def problems(model: onnx.ModelProto) -> Iterator[str]:
    """What TensorRT 10.3 is not known to take of a model whose types can be inferred."""
    for one in model.opset_import:
        if one.domain or one.version not in OPSETS:
            yield f"operators of {one.domain or 'ONNX'} {one.version}"
    inferred = onnx.shape_inference.infer_shapes(model)
    yield from _graph(inferred.graph, {}, set())


def _graph(graph: onnx.GraphProto, types: dict[str, str], constants: set[str]) -> Iterator[str]:
    name_of = onnx.TensorProto.DataType.Name
    types, constants = dict(types), constants | {one.name for one in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = name_of(value.type.tensor_type.elem_type)
    types |= {one.name: name_of(one.data_type) for one in graph.initializer}
    values = {one.name: one for one in graph.initializer}
    for node in graph.node:
        where = f"{node.op_type} ({node.name})"
        if node.domain or node.op_type not in OPERATORS:
            yield f"{where} is not in the list"
            continue
        wrong = {types.get(name, "?") for name in _data(node)} - OPERATORS[node.op_type]
        if wrong:
            yield f"{where} of {', '.join(sorted(wrong))}"
        for index in CONSTANTS.get(node.op_type, ()):
            if index < len(node.input) and node.input[index] and node.input[index] not in constants:
                yield f"{where}: input {index} is no constant"
        yield from (f"{where}: {what}" for what in _restrictions(node, values))
        for one in node.attribute:
            if one.type == onnx.AttributeProto.GRAPH:
                yield from _graph(one.g, types, constants)


def _restrictions(node: onnx.NodeProto, values: dict[str, onnx.TensorProto]) -> Iterator[str]:
    """What the table says of single operators."""
    known = {index: values[name] for index, name in enumerate(node.input) if name in values}
    quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    if quantizes and 2 in known and onnx.numpy_helper.to_array(known[2]).any():
        yield "its zero point is not 0"
    if node.op_type == "Resize":
        said = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        places = (b"half_pixel", b"pytorch_half_pixel", b"asymmetric", b"align_corners")
        if said.get("mode", b"nearest") not in (b"nearest", b"linear"):
            yield f"its mode is {said['mode'].decode()}"
        if said.get("coordinate_transformation_mode", b"half_pixel") not in places:
            yield f"its places are {said['coordinate_transformation_mode'].decode()}"
        if said.get("antialias") or said.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
            yield "it is antialiased or keeps the aspect ratio"
    if node.op_type == "TopK":
        if any(one.name == "sorted" and one.i != 1 for one in node.attribute):
            yield "not sorted"
        if 1 in known and onnx.numpy_helper.to_array(known[1]).item() > TOPK_LIMIT:
            yield f"K is larger than {TOPK_LIMIT}"


def _data(node: onnx.NodeProto) -> list[str]:
    """The tensors of a node whose types are restricted: not indices, shapes, axes and counts."""
    if node.op_type == "Scan":
        return [*node.input, *node.output]
    if node.op_type == "Where":
        return list(node.input[1:])
    if node.op_type in ("TopK", "ArgMax", "CumSum", "Split", "Pad", "Shape", "DequantizeLinear"):
        return list(node.input[:1])
    if node.op_type.startswith("Reduce"):
        return list(node.input[:1])
    if node.op_type == "QuantizeLinear":
        return list(node.input[:2])
    if node.op_type == "Cast":
        return [*node.input, *node.output]
    return [name for name in node.input[: _INDICES.get(node.op_type)] if name]
