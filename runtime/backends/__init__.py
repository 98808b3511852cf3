"""What can run a graph, by the name a user gives to `--provider`.

A provider is one line in `PROVIDERS`: a function that takes the bundle, the name of a graph and the
options, and gives a `Runner`. It is imported when it is asked for, so a missing package of one
provider does not trouble another.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from visprune.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from visprune.bundle import Bundle
    from visprune.runtime.runner import BackendOptions, Runner

__all__ = ["PLANNED", "PROVIDERS", "backend"]

PROVIDERS = {
    "cpu": "visprune.runtime.backends.ort:open_cpu",
    "cuda": "visprune.runtime.backends.ort_nvidia:open_cuda",
    "ort-tensorrt": "visprune.runtime.backends.ort_nvidia:open_tensorrt",
    "ort-tensorrt-rtx": "visprune.runtime.backends.ort_nvidia:open_tensorrt_rtx",
}

PLANNED = ("tensorrt", "tensorrt-rtx")
"""Names that are taken already and run nothing yet."""


def backend(provider: str) -> Callable[[Bundle, str, BackendOptions], Runner]:
    """What opens the graphs of a bundle with this provider.

    Raises:
        UsageError: No provider has this name.
        UnsupportedError: The provider is planned and not built.
        MissingExtraError: Its package is not installed.
    """
    if provider in PLANNED:
        raise UnsupportedError(
            f"The provider {provider!r} is not part of this version.", f"Use one of: {', '.join(PROVIDERS)}."
        )
    if provider not in PROVIDERS:
        close = difflib.get_close_matches(provider.lower(), [*PROVIDERS, *PLANNED], n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"Use one of: {', '.join(PROVIDERS)}."
        raise UsageError(f"There is no provider {provider!r}.", hint)
    module, _, name = PROVIDERS[provider].partition(":")
    opener: Callable[[Bundle, str, BackendOptions], Runner] = getattr(importlib.import_module(module), name)
    return opener
