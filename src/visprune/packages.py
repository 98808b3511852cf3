"""Helpers of `__init__` files: names imported when they are used, and packages that can be called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

__all__ = ["lazy", "make_callable"]


def lazy(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose names are imported when they are used.

    Args:
        package: Dotted name of the package.
        places: Dotted name of the module that defines each name.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 - the name that Python looks for
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(places[name]), name)

    return __getattr__


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(package: str) -> None:
    """Make a package callable: it calls the function in it that has the package's own name.

    So `visprune.export(...)` works whether the function or the package was imported first.
    """
    sys.modules[package].__class__ = _CallablePackage
