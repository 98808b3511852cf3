"""The bundled demo model: a small LLaVA trained on generated scenes, its data and its training script.

It exists so that pruning can be judged on a machine with no network: its questions have one right
answer, and the answer stands in a few of the 144 patches. Importing this package needs nothing but the
standard library.
"""

from __future__ import annotations

from visprune.bundled import CALIBRATION, IMAGE, MODEL_DIR, QUESTIONS

__all__ = ["CALIBRATION", "IMAGE", "MODEL_DIR", "QUESTIONS"]
