"""Fixtures: tiny checkpoints that estimates are made for."""

from __future__ import annotations

from checkpoints import checkpoint
from tracing import _collected, _quick_traces

__all__ = ["_collected", "_quick_traces", "checkpoint"]
