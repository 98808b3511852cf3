"""Fixtures: tiny checkpoints that estimates are made for."""

from __future__ import annotations

from checkpoints import _collected, _quick_traces, checkpoint

__all__ = ["_collected", "_quick_traces", "checkpoint"]
