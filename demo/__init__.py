"""The bundled demo model: a small LLaVA trained on generated scenes, with its data and its training script.

With it, pruning can be judged on a machine without a network: its questions have one right answer, and the
answer is in a few of the 144 patches. Importing this package needs only the standard library.
"""

from __future__ import annotations

from visprune.bundled import CALIBRATION, IMAGE, MODEL_DIR, QUESTIONS

__all__ = ["CALIBRATION", "IMAGE", "MODEL_DIR", "QUESTIONS"]
