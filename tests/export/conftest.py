"""The tiny checkpoints that exports are tested on."""

from __future__ import annotations

from checkpoints import _collected, _quick_traces, checkpoint, pictures

__all__ = ["_collected", "_quick_traces", "checkpoint", "pictures"]
