"""The runtime: loads a bundle and answers questions, without torch, transformers or onnx.

    from visprune.runtime import load

    with load("my-bundle") as pipeline:
        print(pipeline.generate("cat.png", "What is in the image?").text)

Importing this package imports none of its modules. Each name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from visprune.packages import lazy

if TYPE_CHECKING:
    from visprune.runtime.conversation import Chat
    from visprune.runtime.generation import Generation, Stream
    from visprune.runtime.loading import load
    from visprune.runtime.messages import Message
    from visprune.runtime.pipeline import Pipeline
    from visprune.runtime.sampling import Sampling
    from visprune.runtime.turns import Turn
    from visprune.runtime.vision.sources import Video

__all__ = ["Chat", "Generation", "Message", "Pipeline", "Sampling", "Stream", "Turn", "Video", "load"]

_LAZY = {
    "Chat": "visprune.runtime.conversation",
    "Generation": "visprune.runtime.generation",
    "Message": "visprune.runtime.messages",
    "Pipeline": "visprune.runtime.pipeline",
    "Sampling": "visprune.runtime.sampling",
    "Stream": "visprune.runtime.generation",
    "Turn": "visprune.runtime.turns",
    "Video": "visprune.runtime.vision.sources",
    "load": "visprune.runtime.loading",
}

__getattr__ = lazy(__name__, _LAZY)


def __dir__() -> list[str]:
    return __all__
