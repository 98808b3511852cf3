"""The search for the fewest layers to leave float, so that the error of a graph stays within the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from visprune.quantize.layer_choices import GraphChoices
from visprune.quantize.quantize_options import FLOAT, STATIC

__all__ = ["leave_out"]

NOTE = "left out: its error is among the largest"


def leave_out(
    choices: GraphChoices, attempt: Callable[[GraphChoices], float | None], budget: float
) -> GraphChoices:
    """Leave as few layers float as the error budget requires.

    Candidates are the layers whose activations are rounded to a fixed range, those with the largest errors
    first. The number of layers left float is doubled until the error of the graph is within the budget, and
    then bisected.

    Args:
        choices: The choices with every layer quantized.
        attempt: Writes the graph by some choices and returns its error; None if there is nothing to measure
            it on.
        budget: The largest error allowed.

    Returns:
        The choices that were attempted last, which are those on disk.
    """
    error = attempt(choices)
    layers = {n: layer.error or 0.0 for n, layer in choices.layers.items() if layer.precision in STATIC}
    order = sorted(layers, key=lambda name: -layers[name])
    if error is None or error <= budget or not order:
        return choices

    def fits(count: int) -> bool:
        reached = attempt(_without(choices, order[:count]))
        return reached is None or reached <= budget

    too_few, enough = 0, 1
    while not fits(enough):
        if enough == len(order):  # all candidates are float already; the remaining error comes from elsewhere
            return _without(choices, order)
        too_few, enough = enough, min(2 * enough, len(order))
    last = enough
    while enough - too_few > 1:
        last = (too_few + enough) // 2
        too_few, enough = (too_few, last) if fits(last) else (last, enough)
    if last != enough:
        fits(enough)  # write the graph again by these choices
    return _without(choices, order[:enough])


def _without(choices: GraphChoices, names: list[str]) -> GraphChoices:
    """Return the choices with some layers left float. Factors stay where they are."""
    layers = dict(choices.layers)
    for name in names:
        layers[name] = replace(layers[name], precision=FLOAT, scale=None, note=NOTE)
    return GraphChoices(layers, choices.rows, choices.columns, choices.norms)
