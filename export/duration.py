"""A rough estimate of how long an export takes, from exports that were measured.

The measurements are in `docs/performance.md`, all on two cores of an AMD EPYC:

- 14.13 GB of float16 weights, compared layer by layer: 248 s and 367 s, so up to 26 s for each GB.
- 0.8 billion parameters in float32 (3.2 GB): 96 s without the self-check, and 80 s more for the whole one.
- A recipe for the same model: 239 s for 16 samples.
"""

from __future__ import annotations

from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.manifest import Scope

__all__ = ["expected"]

_GB = 26.0  # seconds for each GB of weight files: read, trace, convert, write, hash, compare layers
_WHOLE = 100.0  # seconds for each billion parameters of a whole self-check
_SAMPLE = 19.0  # seconds for each billion parameters and sample of a fit


def expected(checkpoint: Checkpoint, scope: Scope | None, *, fits: bool) -> str:
    """Say roughly how long an export will take.

    Args:
        checkpoint: The model.
        scope: How far it is compared with PyTorch; None: not at all.
        fits: Whether a FitPrune recipe is fitted first.
    """
    files = sum(path.stat().st_size for path in checkpoint.weights)
    billions = checkpoint.elements / 1e9
    seconds = _GB * files / 1e9 + (_WHOLE * billions if scope == "whole" else 0.0)
    sample = _SAMPLE * billions
    fit = f", after a fit of about {_in_words(sample)} a sample" if fits and sample >= 1 else ""
    if seconds < 45 and not fit:
        return "This export should take under a minute."
    basis = "The estimate comes from exports that were measured on two processor cores."
    return f"This export should take about {_in_words(seconds)}{fit}. {basis}"


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
