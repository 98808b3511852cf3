"""What a model costs, and how well it answers.

`flops` counts work by formula. `comparison` measures bundles side by side and `sweep` every combination of
methods, ratios and precisions; `report` is what they find, which `table` and `page` show. `evaluate` asks
bundles questions with known answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprune.bench.evaluation.evaluator import evaluate
    from visprune.bench.evaluation.formats import read_questions

__all__ = ["evaluate", "read_questions"]

_LAZY = {
    "evaluate": "visprune.bench.evaluation.evaluator",
    "read_questions": "visprune.bench.evaluation.formats",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'visprune.bench' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
