"""Graphs of a bundle as onnx-ir has them, their weights mapped from where they really lie.

onnx-ir refuses weights that are reached through a link or have several hard links, because a file beside an
untrusted graph could be one from elsewhere. A bundle answers that in another way: it names its files, says
where they may lie, and has a hash of each. So bundles in the hub's cache and hard-linked copies can be read.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import onnx_ir as ir

from visprune.bundle import Bundle
from visprune.errors import BundleError

__all__ = ["load_graph", "serialize"]


def load_graph(bundle: Bundle, name: str) -> ir.Model:
    """A graph of a bundle; its weights are read when they are asked for.

    Raises:
        BundleError: The file is no graph, or keeps weights in another file than the manifest tells.
    """
    graph = bundle.manifest.graphs[name]
    try:
        model = ir.load(bundle.file(graph.file))
    except Exception as error:  # protobuf's own
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
        # Without a `base_dir` the location is taken as it is.
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
    """A model of `load_graph`, and the folder in which its weights stay: ONNX Runtime takes no links here."""
    proto = ir.to_proto(model)
    folder = Path()
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                folder, entry.value = Path(entry.value).parent, Path(entry.value).name
    return proto.SerializeToString(), folder
