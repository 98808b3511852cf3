"""Every error visprune raises on purpose.

    VispruneError
    ├── UsageError          an option, an argument or a combination of them
    ├── CheckpointError     the model to export: missing, truncated, of another kind
    ├── UnsupportedError    asked for, understood, and not possible
    ├── ExportError         the export went wrong
    │   └── ParityError     an exported graph does not compute what PyTorch computes
    ├── EngineError         a TensorRT engine could not be built
    ├── BundleError         a bundle is incomplete, altered, or of a newer schema
    ├── InputError          an image, a prompt or a conversation that cannot be used
    └── MissingExtraError   a package that this feature needs is not installed

An error carries two sentences: what is wrong, and what to do about it. Commands print both and
end with exit code 2; anything else that escapes is a bug, and shows its traceback.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "InputError",
    "MissingExtraError",
    "ParityError",
    "UnsupportedError",
    "UsageError",
    "VispruneError",
]


class VispruneError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: One sentence: what is wrong, with the value that was found.
        hint: One sentence: what to do.
    """

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what, hint)  # both, so that an error can be pickled
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} {self.hint}"


class UsageError(VispruneError):
    """An option, an argument or a combination of them that means nothing."""


class CheckpointError(VispruneError):
    """The model to export cannot be read."""


class UnsupportedError(VispruneError):
    """Something that was understood and is not possible."""


class ExportError(VispruneError):
    """The export went wrong."""


class ParityError(ExportError):
    """An exported graph does not compute what PyTorch computes."""


class EngineError(VispruneError):
    """A TensorRT engine could not be built."""


class BundleError(VispruneError):
    """A bundle that is incomplete, altered, or written by a newer visprune."""


class InputError(VispruneError):
    """An image, a prompt or a conversation that cannot be used."""


class MissingExtraError(VispruneError):
    """A package that this feature needs is not installed."""
