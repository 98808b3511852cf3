"""Tables of `gpu.py`: times, memory, agreement between contestants, and speed-ups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from measure import ratio
from rounds import times

if TYPE_CHECKING:
    from gpu import Entry

__all__ = ["COMPILED", "SDPA", "TOLERANCE", "agreement", "report", "speed_ups"]

TOLERANCE = 0.02
"""Largest relative difference (L2) of the first token's logits, between those that keep the same tokens."""

SDPA, COMPILED = "transformers", "transformers, compiled"
"""Names of the contestants that run transformers."""


def agreement(done: list[Entry]) -> Iterator[tuple[str, float, int]]:
    """Compare each contestant with the first that keeps the same tokens.

    Yields:
        Names, the relative difference of the logits, and the number of equal new tokens before one differs.
    """
    for pruned in (False, True):
        first, *others = [entry for entry in done if entry.pruned is pruned] or [None]
        for entry in others:
            error = np.linalg.norm(entry.logits - first.logits) / np.linalg.norm(first.logits)
            pairs = zip(entry.tokens, first.tokens, strict=True)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(first.tokens))
            yield f"{entry.name} / {first.name}", float(error), same


def speed_ups(done: list[Entry]) -> Iterator[tuple[str, float, float]]:
    """Compare the pruned contestants with transformers.

    Yields:
        The two that are compared and their metric, the speed-up, and the goal.
    """
    ran = {entry.name: entry.contestant for entry in done}
    theirs = [ran[name] for name in (SDPA, COMPILED) if name in ran]
    best = min(theirs, key=lambda other: other.summaries["first token"].median, default=None)
    for mine in [entry.contestant for entry in done if entry.pruned]:
        for metric, other, wanted in (("first token", best, 2.0), ("decode", ran.get(COMPILED), 1.0)):
            if other is not None:
                what = f"{metric}, {other.name} / {mine.name}"
                yield what, ratio(other.ms[metric], mine.ms[metric]), wanted


def report(done: list[Entry], *, rehearsal: bool) -> None:
    """Print the tables."""
    times([entry.contestant for entry in done])
    print(f"\n{'':32s}{'tokens/s':>10s}{'peak ' + ('host' if rehearsal else 'GPU') + ' MB':>16s}")
    for entry in done:
        rate = 1e3 / entry.contestant.summaries["decode"].median
        print(f"{entry.name:32s}{rate:10.1f}{entry.memory:16.0f}")
    print(
        f"\nlogits of the first token, relative difference (at most {TOLERANCE:g}); tokens before one differs"
    )
    for what, error, same in agreement(done):
        said = "ok" if error <= TOLERANCE else "NOT within tolerance"
        print(f"{what:64s}{error:10.5f}  {said};  {same} of {len(done[0].tokens)}")
    print("\nspeed-ups" + (", in a rehearsal: they say nothing of a GPU" if rehearsal else ", and the goals"))
    for what, value, wanted in speed_ups(done):
        verdict = "" if rehearsal else f"   goal {wanted:g}: {'met' if value >= wanted else 'NOT met'}"
        print(f"{what:64s}{value:10.2f}{verdict}")
