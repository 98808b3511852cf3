"""The runtime: loads a bundle and answers questions, without torch, transformers or onnx.

    from visprune.runtime import load

    with load("my-bundle") as pipeline:
        print(pipeline.generate("cat.png", "What is in the image?").text)

Importing this package imports none of its modules. Each name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprune.runtime.conversation import Chat
    from visprune.runtime.generation import Generation, Stream
    from visprune.runtime.pipeline import Pipeline, load
    from visprune.runtime.sampling import Sampling
    from visprune.runtime.vision.sources import Video

__all__ = ["Chat", "Generation", "Pipeline", "Sampling", "Stream", "Video", "load"]

_LAZY = {
    "Chat": "visprune.runtime.conversation",
    "Generation": "visprune.runtime.generation",
    "Pipeline": "visprune.runtime.pipeline",
    "Sampling": "visprune.runtime.sampling",
    "Stream": "visprune.runtime.generation",
    "Video": "visprune.runtime.vision.sources",
    "load": "visprune.runtime.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'visprune.runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
