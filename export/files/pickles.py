"""The location of each tensor in a pickled weight file, such as pytorch_model.bin.

Such a file is a zip archive of one pickle and of the tensors' bytes, which are not compressed. PyTorch reads
the pickle with `weights_only=True`, so no code of the file runs, and with fake tensors, so no tensor is read.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visprune.errors import CheckpointError, UnsupportedError
from visprune.export.files.small_files import check_not_lfs_pointer
from visprune.export.files.stored import BYTES, StoredTensor, check_dtype
from visprune.optional import require

if TYPE_CHECKING:
    import torch

__all__ = ["read_pickle"]

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "bool": "BOOL",
}
# The header of a file in an archive: its signature, the length of its name, the length of its extra field.
_HEADER = struct.Struct("<4s22xHH")
_SIGNATURE = b"PK\x03\x04"
_RESAVE = "If you trust the file, load it once with torch and save its tensors as safetensors."


def read_pickle(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file that torch.save wrote, by their names in it.

    The tensors are the values of a dictionary, or of the one dictionary in it that has tensors, as in
    {"state_dict": {...}, "epoch": 3}. None, numbers and texts beside the tensors are left out, because no
    parameter of a model is stored as one of them.

    Raises:
        CheckpointError: The file is truncated or was not written by torch.save.
        UnsupportedError: The file needs more than tensors, has objects where tensors are expected, or has
            tensors that cannot be read in place or are of a dtype that cannot be exported.
    """
    torch: Any = require("torch", extra="export")
    check_not_lfs_pointer(file)
    records = _records(file)
    found = {}
    for name, value in _tensors(file, _load(file)).items():
        if not isinstance(value, torch.Tensor):
            if value is None or isinstance(value, int | float | str):
                continue
            raise UnsupportedError(
                f"{file} holds {name!r}, a {type(value).__name__} and not a tensor.", _RESAVE
            )
        if not isinstance(name, str):
            raise UnsupportedError(f"{file} holds a tensor named {name!r}, which is no text.", _RESAVE)
        found[name] = _stored(file, name, value, records)
    return found


def _records(file: Path) -> dict[int, int]:
    """Return the size of each file in an archive, by the position of its first byte."""
    found = {}
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise UnsupportedError(
                        f"{file} was packed again: {entry.filename} in it is compressed.",
                        "Take the file as torch.save wrote it, or unpack it and pack it without compression.",
                    )
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise UnsupportedError(f"{file} was written by a big-endian machine.", _RESAVE)
                if entry.header_offset < 0:  # bytes are missing in the middle
                    raise zipfile.BadZipFile
                stream.seek(entry.header_offset)
                signature, name, extra = _HEADER.unpack(stream.read(_HEADER.size))
                if signature != _SIGNATURE:
                    raise zipfile.BadZipFile
                found[entry.header_offset + _HEADER.size + name + extra] = entry.file_size
    except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError, ValueError):
        raise _broken_error(file) from None
    return found


def _broken_error(file: Path) -> CheckpointError | UnsupportedError:
    """Return the error for a file that is no whole archive."""
    with file.open("rb") as stream:
        begin = stream.read(512)
    if begin.startswith(_SIGNATURE):
        return CheckpointError(f"The weight file {file} is truncated.", "Download it again.")
    if begin.startswith(b"\x80") or begin[257:262] == b"ustar":
        return UnsupportedError(
            f"{file} is a plain pickle, or of the format that torch wrote before version 1.6.", _RESAVE
        )
    return CheckpointError(f"{file} is not a file of torch.save.", "Download it again.")


def _load(file: Path) -> Any:
    """Unpickle a file into fake tensors, which have a shape and a place but no values."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        if wanted := torch.serialization.get_unsafe_globals_in_checkpoint(file):
            raise UnsupportedError(
                f"{file} needs more than tensors: it would load {', '.join(sorted(wanted)[:3])}"
                f"{' and others' if len(wanted) > 3 else ''}.",
                "Take the checkpoint as safetensors. Nothing of the file was run.",
            )
        logging.disable()  # torch logs and warns of some kinds of tensors before it fails
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, weights_only=True)
    except UnsupportedError:
        raise
    except Exception as error:  # errors of many types, for sparse and quantized tensors among others
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"{file} cannot be read as plain tensors: {reason[:200]}", _RESAVE) from None
    finally:
        logging.disable(logging.NOTSET)


def _tensors(file: Path, found: Any) -> dict[Any, Any]:
    """Return the dictionary that has the tensors: the one that was saved, or the only one in it."""
    import torch

    def has_tensors(value: Any) -> bool:
        return isinstance(value, dict) and any(isinstance(one, torch.Tensor) for one in value.values())

    if has_tensors(found):
        return dict(found)
    inner = [key for key, value in found.items() if has_tensors(value)] if isinstance(found, dict) else []
    if len(inner) == 1:
        return dict(found[inner[0]])
    if inner:
        names = " and ".join(repr(key) for key in inner)
        raise UnsupportedError(
            f"{file} holds several dictionaries of tensors, {names}.",
            "Load it once with torch, and save the one that is the model.",
        )
    raise UnsupportedError(
        f"{file} holds no dictionary of tensors.",
        "Take the file that holds the model's state_dict().",
    )


def _stored(file: Path, name: str, tensor: torch.Tensor, records: dict[int, int]) -> StoredTensor:
    """Return where a fake tensor's values are in the file."""
    import torch

    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_neg():
        raise UnsupportedError(f"The tensor {name} in {file} is not stored as plain values.", _RESAVE)
    kind = str(tensor.dtype).removeprefix("torch.")
    dtype = _DTYPES.get(kind, kind)
    check_dtype(file, name, dtype)
    # This attribute is not documented, but torch offers no other way to learn where a storage is. So its
    # value is checked: a file that holds the tensor must start there in the archive. None starts at 0. The
    # size that a fake storage states is not used, because in torch 2.10 it is too large.
    start, size = tensor.untyped_storage()._checkpoint_offset or 0, BYTES[dtype]
    before = int(tensor.storage_offset()) * size
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    last = sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
    length = (last + 1) * size if tensor.numel() else 0
    if start not in records or before + length > records[start]:
        raise CheckpointError(
            f"{file} does not hold the tensor {name} where torch.save puts it.",
            "Download it again; if it was packed again, take the file as torch.save wrote it.",
        )
    contiguous = tensor.is_contiguous()
    return StoredTensor(name, file, start + before, length, dtype, shape, None if contiguous else strides)
