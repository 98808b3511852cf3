"""Questions with known answers, asked of bundles: metrics with intervals, and paired comparisons.

questions     what is asked, and the JSONL form of it
formats       the published forms of common sets
answering     one bundle answers one question
workers       which process does so; cluster: on which machine
ledger        the file of answers, from which a stopped run goes on
answer_text   what an answer says
metrics       whether that is right
intervals     how sure that is
summary       the figures of all bundles
evaluator     all of it, in order
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprune.evaluation.evaluator import evaluate
    from visprune.evaluation.formats import read_questions

__all__ = ["evaluate", "read_questions"]

_LAZY = {
    "evaluate": "visprune.evaluation.evaluator",
    "read_questions": "visprune.evaluation.formats",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'visprune.evaluation' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
