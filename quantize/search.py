"""Leave the most sensitive layers of a graph float until its output is near enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from visprune.quantize.layer_choices import GraphPlan
from visprune.quantize.quantize_options import FLOAT

__all__ = ["leave_out"]

_CLIPPED = ("int8", "fp8")
NOTE = "left out: its error is among the largest"


def leave_out(plan: GraphPlan, attempt: Callable[[GraphPlan], float | None], budget: float) -> GraphPlan:
    """The plan with as few layers left float as the error budget takes.

    Layers whose activations are rounded too are candidates, in the order of their own errors. Their number is
    doubled until the graph's error is within the budget, and then halved back.

    Args:
        plan: With everything quantized.
        attempt: Writes the graph by a plan and gives its error; None where there is nothing to measure it on.
        budget: The largest error allowed.

    Returns:
        The plan that was attempted last.
    """
    error = attempt(plan)
    layers = {n: layer.error or 0.0 for n, layer in plan.layers.items() if layer.precision in _CLIPPED}
    order = sorted(layers, key=lambda name: -layers[name])
    if error is None or error <= budget or not order:
        return plan

    def fits(count: int) -> bool:
        reached = attempt(_without(plan, order[:count]))
        return reached is None or reached <= budget

    too_few, enough = 0, 1
    while not fits(enough):
        if enough == len(order):  # what is left over is not the doing of these layers
            return _without(plan, order)
        too_few, enough = enough, min(2 * enough, len(order))
    last = enough
    while enough - too_few > 1:
        last = (too_few + enough) // 2
        too_few, enough = (too_few, last) if fits(last) else (last, enough)
    if last != enough:
        fits(enough)
    return _without(plan, order[:enough])


def _without(plan: GraphPlan, names: list[str]) -> GraphPlan:
    """The plan with some layers left float; factors stay where they are."""
    layers = dict(plan.layers)
    for name in names:
        layers[name] = replace(layers[name], precision=FLOAT, scale=None, note=NOTE)
    return GraphPlan(layers, plan.rows, plan.columns, plan.norms)
