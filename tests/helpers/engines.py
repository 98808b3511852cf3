"""TensorRT-RTX engines of a bundle's graphs; they are built without a GPU."""

from __future__ import annotations

import pytest

trt = pytest.importorskip("tensorrt_rtx")

# The least, usual and most of each dynamic dimension; K is an input of its own.
SIZES = {"S": (1, 80, 160), "P": (0, 80, 160), "T": (1, 1, 2), "M": (1, 72, 288)}
KEPT = (1, 36, 144)
# Of a picture that is several tiles of 16 tokens.
TILES = SIZES | {"T": (2, 3, 5), "M": (1, 12, 80), "R": (1, 4, 8), "J": (1, 1, 4)}
TILES_KEPT = {"keep_tokens": (1, 4, 16), "image_tokens": (3, 16, 88)}
ALL_TILES_KEPT = {"keep_tokens": (2, 12, 80), "image_tokens": (3, 16, 88)}


def engine(path, graph, sizes, kept, sm=86):
    """Build one graph for an SM; the parser's errors, or the size of the engine."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return [str(parser.get_error(index)) for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    profile = builder.create_optimization_profile()
    specs = {spec.name: spec for spec in graph.inputs}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, *([count] for count in kept.get(tensor.name, KEPT)))
            continue
        shape = specs[tensor.name].shape
        least, usual, most = (
            tuple(d if isinstance(d, int) else sizes[d][i] for d in shape) for i in range(3)
        )
        if least != most:
            profile.set_shape(tensor.name, least, usual, most)
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    return 0 if built is None else memoryview(built).nbytes


def check(bundle, names, sizes=SIZES, kept=None, sm=86):
    """Every graph of these becomes an engine."""
    for name in names:
        graph = bundle.manifest.graphs[name]
        built = engine(bundle.file(graph.file), graph, sizes, kept or {}, sm)
        assert isinstance(built, int), f"{name}: {built}"
        assert built > 0, name
