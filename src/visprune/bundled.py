"""Paths of the data that comes with the package: the demo model, its image, questions and samples.

The code that made them, and that measures with them, is in `visprune.demo`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CALIBRATION", "DEMO", "IMAGE", "MODEL_DIR", "QUESTIONS"]

_HERE = (Path(__file__).parent / "demo").resolve()

DEMO = "visprune-demo"
"""Name of the demo model, in bundles, recipes and reports."""

MODEL_DIR = _HERE / "model"
"""The Hugging Face checkpoint directory of the demo model."""

IMAGE = _HERE / "scene.png"
"""A held-out scene, drawn at four times the size that the model sees."""

QUESTIONS = _HERE / "questions.json"
"""Questions about `IMAGE` with the right answers: a list of ``{"question": ..., "answer": ...}``."""

CALIBRATION = _HERE / "calibration.jsonl"
"""Samples to fit recipes on: lines of ``{"image": ..., "prompt": ...}``, paths relative to the file."""
