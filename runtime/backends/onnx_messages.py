"""ONNX models as protobuf messages, without the package onnx.

ONNX Runtime needs the package protobuf anyway. Only the fields that the runtime reads or writes are described
here; protobuf keeps all others as they are. The numbers are those of onnx.proto (ONNX IR version 10).
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["attribute", "parse"]

_FLOAT, _INT64, _INT32, _STRING, _MESSAGE = 2, 3, 5, 9, 11  # FieldDescriptorProto.Type
_ONE, _MANY = 1, 3  # FieldDescriptorProto.Label
_ATTRIBUTE_KINDS = {float: ("f", 1), int: ("i", 2)}  # field, AttributeProto.AttributeType

# By message: (name, number, label, type), where a type that is a text names another message.
_FIELDS: dict[str, list[tuple[str, int, int, int | str]]] = {
    "Model": [("graph", 7, _ONE, "Graph"), ("opset_import", 8, _MANY, "Opset")],
    "Opset": [("domain", 1, _ONE, _STRING), ("version", 2, _ONE, _INT64)],
    "Graph": [
        ("node", 1, _MANY, "Node"),
        ("initializer", 5, _MANY, "Tensor"),
        ("input", 11, _MANY, "ValueInfo"),
        ("output", 12, _MANY, "ValueInfo"),
    ],
    "Node": [
        ("input", 1, _MANY, _STRING),
        ("output", 2, _MANY, _STRING),
        ("name", 3, _ONE, _STRING),
        ("op_type", 4, _ONE, _STRING),
        ("attribute", 5, _MANY, "Attribute"),
        ("domain", 7, _ONE, _STRING),
    ],
    "Attribute": [
        ("name", 1, _ONE, _STRING),
        ("f", 2, _ONE, _FLOAT),
        ("i", 3, _ONE, _INT64),
        ("type", 20, _ONE, _INT32),
    ],
    "Tensor": [("name", 8, _ONE, _STRING), ("external_data", 13, _MANY, "Entry")],
    "Entry": [("key", 1, _ONE, _STRING), ("value", 2, _ONE, _STRING)],
    "ValueInfo": [("name", 1, _ONE, _STRING), ("type", 2, _ONE, "Type")],
    "Type": [("tensor_type", 1, _ONE, "TensorType")],
    "TensorType": [("elem_type", 1, _ONE, _INT32), ("shape", 2, _ONE, "Shape")],
    "Shape": [("dim", 1, _MANY, "Dim")],
    "Dim": [("dim_value", 1, _ONE, _INT64), ("dim_param", 2, _ONE, _STRING)],
}


def parse(content: bytes) -> Any:
    """Parse a serialized `ModelProto`.

    Raises:
        ImportError: The package protobuf is missing or too old.
        ValueError: The content is no ONNX model.
    """
    from google.protobuf.message import DecodeError

    model = _model_class()()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ValueError("no ONNX model") from error
    return model


def attribute(node: Any, name: str, value: float) -> None:
    """Add an attribute to a node: an `int` as INT, a `float` as FLOAT."""
    field, kind = _ATTRIBUTE_KINDS[type(value)]
    made = node.attribute.add(name=name, type=kind)
    setattr(made, field, value)


@functools.cache
def _model_class() -> Any:
    """Return the class of `ModelProto`, in a pool of its own: the package onnx may describe it too."""
    from google.protobuf import descriptor_pb2, descriptor_pool
    from google.protobuf.message_factory import GetMessageClass

    file = descriptor_pb2.FileDescriptorProto(name="visprune.proto", package="visprune", syntax="proto2")
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, number, label, kind in fields:
            field = described.field.add(name=name, number=number, label=label)
            field.type = _MESSAGE if isinstance(kind, str) else kind
            if isinstance(kind, str):
                field.type_name = f".visprune.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("visprune.Model"))
