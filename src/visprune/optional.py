"""The one place that imports packages which may not be installed."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from visprune.errors import MissingExtraError

__all__ = ["have", "require"]


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Args:
        module: Dotted name, as in `import module`.
        extra: The extra of visprune that installs it, as in `pip install "visprune[extra]"`.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # A package that is there and misses one of its own parts is another problem: let it show.
        if error.name != package:
            raise
        raise MissingExtraError(
            f"The package {package!r} is not installed.",
            f'Install it with: pip install "visprune[{extra}]".',
        ) from None


def have(module: str) -> bool:
    """Whether `module` could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # no parent of a dotted name; a module without a spec
        return False
