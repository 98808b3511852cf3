"""What can run a graph, by the name a user gives to `--provider`.

A provider is one line in `PROVIDERS`: a function that takes the bundle, the name of a graph and the
options, and gives a `Runner`; or, where the graphs of a bundle share something, a class that is made of the
bundle and the options, and called with the name of a graph. It is imported when it is asked for, so a missing
package of one provider does not trouble another.
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

__all__ = ["ENGINES", "LOW_MEMORY", "PROVIDERS", "backend", "check_low_memory", "graph_opener"]

PROVIDERS = {
    "cpu": "visprune.runtime.backends.ort:open_cpu",
    "cuda": "visprune.runtime.backends.ort_nvidia:open_cuda",
    "tensorrt": "visprune.runtime.backends.engines:Engines",
    "tensorrt-rtx": "visprune.runtime.backends.engines:Engines",
    "ort-tensorrt": "visprune.runtime.backends.ort_nvidia:open_tensorrt",
    "ort-tensorrt-rtx": "visprune.runtime.backends.ort_nvidia:open_tensorrt_rtx",
}

ENGINES = ("tensorrt", "tensorrt-rtx")
"""Those that run the engines of a bundle, and not its graphs."""

LOW_MEMORY = ("cpu", *ENGINES)
"""Those that can do with less memory, see `BackendOptions`."""


def graph_opener(bundle: Bundle, options: BackendOptions) -> Callable[[str], Runner]:
    """What opens the graphs of a bundle, by their names.

    Raises:
        VispruneError: As for `backend`; or the provider cannot run this bundle on this machine.
    """
    found = backend(options.provider)
    if isinstance(found, type):
        made: Callable[[str], Runner] = found(bundle, options)
        return made
    return lambda graph: found(bundle, graph, options)


def check_low_memory(provider: str) -> None:
    """Refuse a provider that always takes all of the memory.

    Raises:
        UsageError: It does.
    """
    if provider not in LOW_MEMORY:
        raise UsageError(
            f"The provider {provider!r} has no low-memory mode.",
            f"Leave that out, or use one of: {', '.join(LOW_MEMORY)}.",
        )


def backend(provider: str) -> Callable[..., Any]:
    """The function or class of a provider.

    Raises:
        UsageError: No provider has this name.
        MissingExtraError: Its package is not installed.
    """
    module, _, name = lookup(provider, PROVIDERS, "provider").partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
