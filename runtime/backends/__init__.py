"""Table of the backends that run graphs, by the name a user gives to `--provider`.

A provider is one line in `PROVIDERS`. It names a function that takes the bundle, the name of a graph and the
options, and returns a `Runner`. If the graphs of a bundle share something, it names a class, which is made
from the bundle and the options and called with the name of a graph. A provider's module is imported when it
is used, so that a missing package of one provider does not affect the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from visprune.errors import UsageError
from visprune.names import lookup

if TYPE_CHECKING:
    from collections.abc import Callable

    from visprune.bundle import Bundle
    from visprune.runtime.backends.runner import BackendOptions, Runner

__all__ = ["AT_ONCE", "ENGINES", "LOW_MEMORY", "PROVIDERS", "backend", "check_low_memory", "graph_opener"]

PROVIDERS = {
    "cpu": "visprune.runtime.backends.ort_cpu:open_cpu",
    "cuda": "visprune.runtime.backends.ort_nvidia:open_cuda",
    "tensorrt": "visprune.runtime.backends.engines:Engines",
    "tensorrt-rtx": "visprune.runtime.backends.engines:Engines",
    "ort-tensorrt": "visprune.runtime.backends.ort_nvidia:open_tensorrt",
    "ort-tensorrt-rtx": "visprune.runtime.backends.ort_nvidia:open_tensorrt_rtx",
}

ENGINES = ("tensorrt", "tensorrt-rtx")
"""Providers that run the engines of a bundle instead of its graphs."""

AT_ONCE = ("cpu",)
"""Providers whose graphs are opened in several threads at once."""

LOW_MEMORY = ("cpu", *ENGINES)
"""Providers that have a low-memory mode (see `BackendOptions`)."""


def graph_opener(bundle: Bundle, options: BackendOptions) -> Callable[[str], Runner]:
    """Return a function that opens a graph of the bundle by its name.

    Raises:
        VispruneError: As for `backend`, or the provider cannot run this bundle on this machine.
    """
    found = backend(options.provider)
    if isinstance(found, type):
        made: Callable[[str], Runner] = found(bundle, options)
        return made
    return lambda graph: found(bundle, graph, options)


def check_low_memory(provider: str) -> None:
    """Refuse a provider that has no low-memory mode.

    Raises:
        UsageError: It has none.
    """
    if provider not in LOW_MEMORY:
        raise UsageError(
            f"The provider {provider!r} has no low-memory mode.",
            f"Load without it, or use one of: {', '.join(LOW_MEMORY)}.",
        )


def backend(provider: str) -> Callable[..., Any]:
    """Import and return the function or class of a provider.

    Raises:
        UsageError: No provider has this name.
        MissingExtraError: The provider's package is not installed.
    """
    module, _, name = lookup(provider, PROVIDERS, "provider").partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
