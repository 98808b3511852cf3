"""The bundled demo model: a small LLaVA trained on generated scenes, its data and its training script.

It exists so that pruning can be judged on a machine with no network: its questions have one right
answer, and the answer stands in a few of the 144 patches. Importing this package needs nothing but the
standard library.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CALIBRATION", "IMAGE", "MODEL_DIR", "QUESTIONS"]

_HERE = Path(__file__).resolve().parent

MODEL_DIR = _HERE / "model"
"""The Hugging Face checkpoint directory of the demo model."""

IMAGE = _HERE / "scene.png"
"""A held-out scene, drawn at four times the size that the model sees."""

QUESTIONS = _HERE / "questions.json"
"""Questions about `IMAGE` with the right answers: a list of ``{"question": ..., "answer": ...}``."""

CALIBRATION = _HERE / "calibration.jsonl"
"""Samples to fit recipes on: lines of ``{"image": ..., "prompt": ...}``, paths relative to the file."""
