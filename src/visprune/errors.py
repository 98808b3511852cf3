"""Exceptions that visprune raises on purpose.

    VispruneError
    ├── UsageError          an option, an argument or a combination of them is wrong
    ├── CheckpointError     the model to export is missing, truncated or of another kind
    ├── UnsupportedError    the request is understood, and is not possible
    │   └── MemoryShortageError  there is not enough memory for it
    ├── ExportError         the export failed
    │   └── ParityError     an exported graph does not compute what PyTorch computes
    ├── EngineError         a TensorRT engine could not be built
    ├── BundleError         a bundle is incomplete, altered, or of a newer schema
    ├── InputError          an image, a prompt or a conversation cannot be used
    └── MissingExtraError   a package that this feature needs is not installed

An error has two sentences: what is wrong, and what to do. Commands print both and end with exit code 2. Any
other exception that reaches the user is a bug, and shows its traceback.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "InputError",
    "MemoryShortageError",
    "MissingExtraError",
    "ParityError",
    "UnsupportedError",
    "UsageError",
    "VispruneError",
]


class VispruneError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: A sentence that says what is wrong, with the value that was found.
        hint: A sentence that says what to do.
    """

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what, hint)  # both are needed to pickle the error
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} {self.hint}"


class UsageError(VispruneError):
    """An option, an argument or a combination of them is wrong."""


class CheckpointError(VispruneError):
    """The model to export cannot be read."""


class UnsupportedError(VispruneError):
    """The request is understood, and is not possible."""


class MemoryShortageError(UnsupportedError):
    """There is not enough memory, perhaps only now."""


class ExportError(VispruneError):
    """The export failed."""


class ParityError(ExportError):
    """An exported graph does not compute what PyTorch computes."""


class EngineError(VispruneError):
    """A TensorRT engine could not be built."""


class BundleError(VispruneError):
    """A bundle is incomplete, altered, or written by a newer visprune."""


class InputError(VispruneError):
    """An image, a prompt or a conversation cannot be used."""


class MissingExtraError(VispruneError):
    """A package that this feature needs is not installed."""
