"""Checks that the interfaces of a bundle's graphs fit each other, the runtime and the model's description.

An interface is the names, dtypes and shapes of a graph's inputs and outputs. This module reads the interfaces
in the manifest; backends compare them with the graphs' files when they load those. So a bundle that was
altered, or put together from two, is refused before a question is asked. A fact that only a graph's constants
hold, such as the length of a table of positions, is found out when the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterator

from visprune.cache_names import PAST
from visprune.errors import BundleError
from visprune.manifest import Manifest, TensorSpec
from visprune.runtime.kv_cache import check_cache
from visprune.runtime.vision.preprocess import ImageProcessor

__all__ = ["check_interfaces", "check_pixels"]

# Values that the runtime supplies or takes: (whether they are floats, dimensions). None stands for any size,
# and a symbolic dimension fits any number. The values of the cache are checked in `kv_cache`.
_RUNTIME_VALUES: dict[str, tuple[bool, tuple[int | None, ...]]] = {
    "pixel_values": (True, (None, 3, None, None)),
    "keep_tokens": (False, ()),
    "input_ids": (False, (1, None)),
    "position_ids": (False, (1, None)),
    "token_places": (False, (None, None)),
    "newline_places": (False, (None,)),
    "image_tokens": (False, ()),
    "token_sources": (False, (None, None, None)),
    "token_weights": (True, (None, None, None)),
    "question_ids": (False, (1, None)),
    "logits": (True, (1, 1, None)),
    "keep_indices": (False, (None, None)),
    "merge_weights": (True, (None, None, None)),
}
_PRUNE_POINT_VALUES = {"keep_tokens": (), "position_ids": (1, None), "keep_indices": (1, None)}


def check_interfaces(manifest: Manifest) -> None:
    """Refuse a bundle whose graphs do not fit each other, the runtime or the manifest's decoder.

    Raises:
        BundleError: A value has another dtype or shape where it is read than where it is written, supplied or
            taken; the logits do not have the size of the vocabulary; or the cache is not the decoder's.
    """
    check_cache(manifest)
    written: dict[str, TensorSpec] = {}
    for stage in manifest.stages:
        graph = manifest.graphs[stage.graph]
        for spec in graph.inputs:
            value = stage.inputs[spec.name]
            _check_known(value, spec, stage.graph)
            if value in written:
                _check_read(value, written[value], spec, stage.graph)
        for spec in graph.outputs:
            if spec.name in stage.outputs:
                _check_known(stage.outputs[spec.name], spec, stage.graph)
                written[stage.outputs[spec.name]] = spec
    vocabulary = manifest.decoder.vocab_size
    found = written["logits"].shape[2] if "logits" in written else vocabulary
    if isinstance(found, int) and found != vocabulary:
        raise _mismatch(f"The logits have {found} numbers for a vocabulary of {vocabulary} tokens.")


def check_pixels(manifest: Manifest, processor: ImageProcessor) -> None:
    """Refuse an image processor that makes images of another size than the graphs take.

    Raises:
        BundleError: The images have another size, or tiles have another size than the manifest's tiling, or
            than images have before they are made smaller.
    """
    height, width = made = processor.output_size
    for spec in _specs_of(manifest, "pixel_values"):
        if any(isinstance(dim, int) and dim != n for dim, n in zip(spec.shape[2:], made, strict=True)):
            raise _mismatch(
                f"The image processor makes pictures of {height} x {width} pixels, and the graphs take "
                f"{list(spec.shape)}."
            )
    resizing = manifest.pruning.resizing
    if resizing is not None and {height, width} != {resizing.image_size}:
        raise _mismatch(
            f"The image processor makes pictures of {height} x {width} pixels, and the vision tower takes "
            f"{resizing.image_size} x {resizing.image_size} or less."
        )
    if manifest.tiling is not None and {height, width} != {manifest.tiling.tile_size}:
        raise _mismatch(
            f"The image processor makes tiles of {height} x {width} pixels, and pictures are cut into tiles "
            f"of {manifest.tiling.tile_size}."
        )


def _specs_of(manifest: Manifest, value: str) -> Iterator[TensorSpec]:
    for stage in manifest.stages:
        yield from (s for s in manifest.graphs[stage.graph].inputs if stage.inputs[s.name] == value)


def _check_known(value: str, spec: TensorSpec, graph: str) -> None:
    """Refuse a value of the runtime that a graph has with another dtype or shape."""
    name, point, number = value.partition(".")
    if value.startswith((PAST, "present.")):
        return
    if value in _RUNTIME_VALUES:
        floating, shape = _RUNTIME_VALUES[value]
    elif point and number.isdecimal() and name in _PRUNE_POINT_VALUES:
        floating, shape = False, _PRUNE_POINT_VALUES[name]
    else:
        return
    kinds = ("float16", "float32") if floating else ("int64",)
    sizes = len(spec.shape) == len(shape) and all(
        wanted is None or isinstance(size, str) or size == wanted
        for size, wanted in zip(spec.shape, shape, strict=True)
    )
    if spec.dtype not in kinds or not sizes:
        raise _mismatch(
            f"{value!r} of the graph {graph!r} is {spec.dtype} {list(spec.shape)}, and this visprune uses "
            f"{' or '.join(kinds)} {['any' if size is None else size for size in shape]}."
        )


def _check_read(value: str, written: TensorSpec, read: TensorSpec, graph: str) -> None:
    """Refuse a value that one graph reads with another dtype or shape than a graph before writes it."""
    alike = written.dtype == read.dtype and len(written.shape) == len(read.shape)
    if not alike or any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(written.shape, read.shape, strict=True)
    ):
        raise _mismatch(
            f"The graph {graph!r} reads {value!r} as {read.dtype} {list(read.shape)}, and it is written as "
            f"{written.dtype} {list(written.shape)}."
        )


def _mismatch(what: str) -> BundleError:
    return BundleError(what, "Copy the bundle again, or export the model again.")
