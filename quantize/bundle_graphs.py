"""Graphs of a bundle as onnx-ir models, with their weights mapped from the files of the bundle.

onnx-ir refuses weights that are reached through a link or that have several hard links, because a file beside
an untrusted graph could come from elsewhere. A bundle guards against that in another way: its manifest names
every file, says where it may lie, and has its hash. So bundles in the hub's cache and hard-linked copies can
be read here.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import onnx_ir as ir

from visprune.bundle import Bundle
from visprune.errors import BundleError

__all__ = ["load_graph", "serialize"]


def load_graph(bundle: Bundle, name: str) -> ir.Model:
    """Load a graph of a bundle; each weight is read when it is first used.

    Raises:
        BundleError: The file is not an ONNX graph, or keeps weights in a file that the manifest does not name
            for this graph.
    """
    graph = bundle.manifest.graphs[name]
    try:
        model = ir.load(bundle.file(graph.file))
    except Exception as error:  # protobuf raises exceptions of its own
        raise BundleError(
            f"{graph.file} is no ONNX graph.", "Copy the bundle again, or export it again."
        ) from error
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = str(PurePosixPath(graph.file).parent / str(tensor.location))
        if graph.data is None or file != str(PurePosixPath(graph.data)):
            raise BundleError(
                f"The graph {name!r} keeps {value.name} in {file!r}, which the manifest does not name.",
                "Copy the bundle again, or export it again.",
            )
        # Without a `base_dir` onnx-ir uses the location as it is, and does not check for links.
        value.const_value = ir.ExternalTensor(
            bundle.file(graph.data).resolve(),
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
        )
    return model


def serialize(model: ir.Model) -> tuple[bytes, Path]:
    """Serialize a model of `load_graph` for ONNX Runtime, which follows no links here.

    Returns:
        The serialized model, and the directory that its weight files are relative to.
    """
    proto = ir.to_proto(model)
    folder = Path()
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                folder, entry.value = Path(entry.value).parent, Path(entry.value).name
    return proto.SerializeToString(), folder
