"""The weight files of a checkpoint, and the location of each tensor in them.

The headers of safetensors files are read here; `pickles` reads those of pickled files.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError
from visprune.export.files.foreign import no_weights_error
from visprune.export.files.pickles import read_pickle
from visprune.export.files.small_files import check_not_lfs_pointer, file_exists
from visprune.export.files.stored import BYTES, StoredTensor, check_dtype

__all__ = ["find_files", "read_headers"]

_NAMES = ("model.safetensors", "pytorch_model.bin")  # as transformers writes them
_AGAIN = "Download it again."


def find_files(path: Path, pickled: bool = False) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Return the files that hold the weights, and their index.

    The index has the file name of each tensor; it is empty if the weights are in a single file.

    Args:
        path: Directory of the checkpoint.
        pickled: Whether pickles are taken if there are no safetensors.

    Raises:
        CheckpointError: There are no weight files, or the index is missing or cannot be used.
    """
    for name in _NAMES if pickled else _NAMES[:1]:
        single, index = path / name, path / f"{name}.index.json"
        if file_exists(single):  # transformers does not look for an index then, either
            return (single,), {}
        if file_exists(index):
            places = _read_index(index, single.suffix)
            return tuple(path / name for name in sorted(set(places.values()))), places
        if any(path.glob(f"{single.stem}-*{single.suffix}")):
            raise CheckpointError(
                f"{path} has its weights in several files, and no {index.name}.",
                f"Download {index.name} into it.",
            )
    raise no_weights_error(path, pickled)


def read_headers(files: Iterable[Path], index: Mapping[str, str] | None = None) -> dict[str, StoredTensor]:
    """Return the tensors of all files, by their names on disk.

    Each tensor must be in one file only, and in the one that the index names. A tensor that the index does
    not list is accepted, because every loader takes all tensors of a file.

    Args:
        files: The weight files.
        index: The file name of each tensor.

    Raises:
        CheckpointError: A file is missing, truncated or of another format, or the files and the index
            contradict each other.
        UnsupportedError: A weight is of a dtype that cannot be exported, or a pickle holds more than tensors.
    """
    found: dict[str, StoredTensor] = {}
    hint = "Download the checkpoint into an empty directory."
    for file in files:
        if not file_exists(file):
            raise CheckpointError(f"The weight file {file} is missing.", _AGAIN)
        read = _read_header if file.suffix == ".safetensors" else read_pickle
        for name, tensor in read(file).items():
            if name in found:
                raise CheckpointError(
                    f"The tensor {name} is both in {found[name].file} and in {file.name}.", hint
                )
            found[name] = tensor
    for name, place in (index or {}).items():
        if name not in found or found[name].file.name != place:
            raise CheckpointError(f"The index says that {name} is in {place}, and it is not.", hint)
    return found


def _read_index(index: Path, suffix: str) -> dict[str, str]:
    """Read an index of shards, whose names end in `suffix`: the file name of each tensor."""
    try:
        check_not_lfs_pointer(index)
        places = _loads(index.read_bytes(), index)["weight_map"]
        if not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(
            f"{index} cannot be read: it is not a JSON object that names a file for each tensor.",
            "Take that file from the checkpoint's source.",
        ) from None
    if any(Path(name).name != name or Path(name).suffix != suffix for name in places.values()):
        raise CheckpointError(
            f"{index} names files outside the checkpoint, or of another kind than {suffix}.",
            "Download it from its source.",
        )
    return dict(places)


def _loads(text: bytes, file: Path) -> Any:
    """Parse JSON and refuse an object that has a key twice, of which the parser would hide one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{file} names {key!r} twice.", "Download it from its source.")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a file and check that its tensors fill the file without a gap."""
    check_not_lfs_pointer(file)
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise CheckpointError(f"The weight file {file} is truncated.", _AGAIN)
            header = _loads(stream.read(length), file)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        promised = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        if size != promised:
            raise CheckpointError(
                f"The weight file {file} has {size} bytes, and its header promises {promised}.", _AGAIN
            )
        return _stored(file, entries, 8 + length)
    except (
        struct.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ):
        raise CheckpointError(
            f"The weight file {file} is not safetensors, or is truncated.", _AGAIN
        ) from None


def _stored(file: Path, entries: dict[str, Any], start: int) -> dict[str, StoredTensor]:
    """Return the tensors of a header; their bytes begin at `start` and follow each other without a gap."""
    found, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        check_dtype(file, name, str(entry["dtype"]))
        shape = tuple(int(dim) for dim in entry["shape"])
        begin, end = end, end + math.prod(shape) * BYTES[entry["dtype"]]
        if entry["data_offsets"] != [begin, end] or min(shape, default=0) < 0:
            raise CheckpointError(
                f"The weight file {file} has {entry['dtype']} {entry['shape']} as the shape of {name}, "
                f"and bytes {entry['data_offsets']} for it.",
                _AGAIN,
            )
        found[name] = StoredTensor(name, file, start + begin, end - begin, entry["dtype"], shape)
    return found
