"""Strict reading of dataclasses from JSON, and the hash of a file.

`from_json` reads every JSON file that visprune writes. An unknown, missing or mistyped field is an error that
names the place of the field, so that a mistake in a hand-edited manifest is found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from visprune.errors import BundleError, UsageError

__all__ = ["from_json", "sha256"]

T = TypeVar("T")


def from_json(kind: type[T], data: Any, where: str) -> T:
    """Build a dataclass from parsed JSON.

    Args:
        kind: The dataclass. Its fields are plain values, dataclasses, tuples, dictionaries with string keys,
            unions and literals.
        data: Result of `json.loads`.
        where: Place to name in errors, such as `visprune.json`.

    Raises:
        BundleError: A field is unknown, missing, of the wrong type, an integer of more than 64 bits, or
            refused by the checks of the dataclass.
    """
    return cast(T, _convert(kind, data, where))


def _wrong(where: str, kind: Any, data: Any) -> BundleError:
    wanted = getattr(kind, "__name__", str(kind))
    return BundleError(
        f"{where} should be {wanted}, and is {type(data).__name__}.",
        "Write the file again instead of editing it.",
    )


def _convert(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(cast(type, kind), data, where)
    if origin in (Union, types.UnionType):
        return _convert_union(kind, data, where)
    if origin is Literal:
        if data in get_args(kind):
            return data
        raise _wrong(where, kind, data)
    if origin is tuple:
        return _convert_tuple(kind, data, where)
    if origin is dict:
        if not isinstance(data, dict):
            raise _wrong(where, kind, data)
        return {key: _convert(get_args(kind)[1], value, f"{where}.{key}") for key, value in data.items()}
    if kind is Any:
        return data
    if kind is float and type(data) is int and abs(data) < 2**53:
        return float(data)
    if type(data) is not kind:  # bool is not int here
        raise _wrong(where, kind, data)
    if kind is int and not -(2**63) <= data < 2**63:
        raise BundleError(
            f"{where} is a number of {len(str(abs(data)))} digits, and 64 bits hold no such integer.",
            "Write the file again instead of editing it.",
        )
    return data


def _convert_union(kind: Any, data: Any, where: str) -> Any:
    options = [option for option in get_args(kind) if option is not type(None) or data is None]
    if len(options) == 1:  # the error of the only option says best what is wrong
        return _convert(options[0], data, where)
    for option in options:
        try:
            return _convert(option, data, where)
        except BundleError:
            continue
    raise _wrong(where, kind, data)


def _convert_tuple(kind: Any, data: Any, where: str) -> tuple[Any, ...]:
    args = get_args(kind)
    if not isinstance(data, list) or (args[-1] is not Ellipsis and len(data) != len(args)):
        raise _wrong(where, kind, data)
    items = args if args[-1] is not Ellipsis else (args[0],) * len(data)
    return tuple(_convert(item, data[i], f"{where}[{i}]") for i, item in enumerate(items))


def _convert_dataclass(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(where, kind, data)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    hint = "Write the file again instead of editing it."
    for name in data:
        if name not in fields:
            raise BundleError(f"{where} has an unknown field {name!r}.", hint)
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise BundleError(f"{where} has no {name!r}.", hint)
    values = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except UsageError as error:  # from the checks of a `__post_init__`
        raise BundleError(f"{where} cannot be used: {error.what}", hint) from None


def sha256(path: Path, check_cancelled: Callable[[], None] = lambda: None) -> str:
    """Compute the SHA-256 of a file, in hexadecimal.

    Args:
        path: The file.
        check_cancelled: Called after each block is read; may raise an exception to stop the reading.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            check_cancelled()
            digest.update(block)
    return digest.hexdigest()
