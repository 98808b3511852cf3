"""Import of packages that may not be installed, and the warnings of these packages."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

from visprune.errors import MissingExtraError

__all__ = ["have", "ignore_future_warnings", "require"]


def require(module: str, *, extra: str) -> ModuleType:
    """Import a module, or raise an error that names the extra to install.

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
        # A package that is installed but lacks one of its own parts is another problem: let it show.
        if error.name != package:
            raise
        raise MissingExtraError(
            f"The package {package!r} is not installed.",
            f'Install it with: pip install "visprune[{extra}]".',
        ) from None


def have(module: str) -> bool:
    """Return whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # the parent is missing, or the module has no spec
        return False


def ignore_future_warnings() -> None:
    """Hide what torch and transformers say of their next versions, which is for developers."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")
