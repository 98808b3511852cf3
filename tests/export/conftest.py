"""The tiny checkpoints that exports are tested on."""

from __future__ import annotations

from checkpoints import checkpoint, pictures
from tracing import _collected, _quick_traces

__all__ = ["_collected", "_quick_traces", "checkpoint", "pictures"]
