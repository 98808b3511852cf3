"""The location of each tensor of a checkpoint, from the headers of its safetensors files.

No tensor is read here. A tensor may also be defined as the result of a computation on stored ones, which runs
when the tensor is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.files.foreign import no_weights_error
from visprune.export.files.small_files import check_not_lfs_pointer, file_exists

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ComputedTensor", "StoredTensor", "TensorSource", "find_files", "read_headers"]

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BYTES = _FLOATS | {"I64": 8, "I32": 4, "BOOL": 1}
_AGAIN = "Download it again."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        name: Name in the file.
        file: The file that holds it.
        offset: Position of its first byte in the file.
        length: Number of its bytes.
        dtype: Dtype by its name in safetensors, such as F16 or BF16.
        shape: Its dimensions.
    """

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ComputedTensor:
    """A tensor that is computed from others whenever it is read.

    Attributes:
        name: Name for messages.
        sources: The tensors that are read for it, at least one. Its dtype is that of the first.
        shape: Its dimensions.
        compute: Computes its values, in any dtype, from those of the sources.
    """

    name: str
    sources: tuple[TensorSource, ...]
    shape: tuple[int, ...]
    compute: Callable[[Sequence[Tensor]], Tensor]

    @property
    def file(self) -> Path:
        """The file that holds its first source."""
        return self.sources[0].file

    @property
    def dtype(self) -> str:
        """Dtype by its name in safetensors."""
        return self.sources[0].dtype

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


TensorSource: TypeAlias = StoredTensor | ComputedTensor


def find_files(path: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Return the files that hold the weights, and their index.

    The index has the file name of each tensor; it is empty if the weights are in a single file.

    Raises:
        CheckpointError: There are no weight files, or the index is missing or cannot be used.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if file_exists(single):  # transformers does not look for an index then, either
        return (single,), {}
    if file_exists(index):
        places = _read_index(index)
        return tuple(path / name for name in sorted(set(places.values()))), places
    if any(path.glob("model-*.safetensors")):
        raise CheckpointError(
            f"{path} has its weights in several files, and no {index.name}.",
            f"Download {index.name} into it.",
        )
    raise no_weights_error(path)


def read_headers(files: Iterable[Path], index: Mapping[str, str] | None = None) -> dict[str, StoredTensor]:
    """Return the tensors of all files, by their names on disk.

    Each tensor must be in one file only, and in the one that the index names. A tensor that the index does
    not list is accepted, because every loader takes all tensors of a file.

    Args:
        files: The weight files.
        index: The file name of each tensor.

    Raises:
        CheckpointError: A file is missing, truncated or not safetensors, or the files and the index
            contradict each other.
        UnsupportedError: A weight is of a dtype that cannot be exported.
    """
    found: dict[str, StoredTensor] = {}
    hint = "Download the checkpoint into an empty directory."
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in found:
                raise CheckpointError(
                    f"The tensor {name} is both in {found[name].file} and in {file.name}.", hint
                )
            found[name] = tensor
    for name, place in (index or {}).items():
        if name not in found or found[name].file.name != place:
            raise CheckpointError(f"The index says that {name} is in {place}, and it is not.", hint)
    return found


def _read_index(index: Path) -> dict[str, str]:
    """Read an index of shards: the file name of each tensor."""
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
    if any(Path(name).name != name for name in places.values()):
        raise CheckpointError(f"{index} names files outside the checkpoint.", "Download it from its source.")
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
    if not file_exists(file):
        raise CheckpointError(f"The weight file {file} is missing.", _AGAIN)
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
        _check_dtype(file, name, str(entry["dtype"]))
        shape = tuple(int(dim) for dim in entry["shape"])
        begin, end = end, end + math.prod(shape) * _BYTES[entry["dtype"]]
        if entry["data_offsets"] != [begin, end] or min(shape, default=0) < 0:
            raise CheckpointError(
                f"The weight file {file} has {entry['dtype']} {entry['shape']} as the shape of {name}, "
                f"and bytes {entry['data_offsets']} for it.",
                _AGAIN,
            )
        found[name] = StoredTensor(name, file, start + begin, end - begin, entry["dtype"], shape)
    return found


def _check_dtype(file: Path, name: str, dtype: str) -> None:
    """Refuse a dtype that plain weights do not have; buffers such as `position_ids` may be integers."""
    is_weight = name.endswith((".weight", ".bias"))
    if dtype in _FLOATS or (dtype in _BYTES and not is_weight):
        return
    kind = "which is not a floating-point type" if dtype in _BYTES else "which quantized weights have"
    raise UnsupportedError(
        f"The tensor {name} in {file} is of type {dtype}, {kind}, and cannot be exported.",
        "Take the checkpoint in float32, float16 or bfloat16; a quantized one can often be had unquantized.",
    )
