"""Choice of the layers that delete tokens, for a FitPrune recipe with few prune points.

Each prune point cuts the decoder, and each segment costs start-up time and memory, so a board may need few.
The layers are chosen by the attention of the *unpruned* model, which is known from the first pass over the
samples: a deletion is assumed to cost each later layer the attention that the deleted tokens had there. This
needs no model, so thousands of evaluations take seconds. The scheme itself is then fitted with true
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from visprune.errors import UnsupportedError
from visprune.pruning.recipe import Fit
from visprune.pruning.recipe_search import Search
from visprune.pruning.recipe_task import Step, Task, Unpruned, no_step

__all__ = ["choose_layers", "fit_constrained"]

_HALVINGS = 12
_STRONGEST = 1.0 - 2.0**-_HALVINGS

Cost = tuple[float, float]
"""The smallest alpha that reaches the ratio, and the attention lost with it; less is better. If no alpha
reaches the ratio: 2, and the fraction of the work that is left."""


def choose_layers(task: Task, unpruned: Unpruned, points: int) -> tuple[int, ...]:
    """Choose the layers that reach a ratio with the smallest alpha; ties are decided by the lost attention.

    Layers are added one by one, each time the one that helps most. Then single layers are exchanged as long
    as that helps. The last layer is never chosen, because nothing follows it.

    Args:
        task: The task of the search.
        unpruned: Statistics of the unpruned model.
        points: G, the most layers.

    Returns:
        At most G layers, ascending; the first G layers if no choice reaches the ratio on these statistics.
    """
    table = _Table(task, unpruned)
    candidates = range(task.num_layers - 1)
    chosen: tuple[int, ...] = ()
    cost: Cost = (3.0, 0.0)
    while len(chosen) < min(points, len(candidates)):
        chosen, cost = table.best(_with(chosen, layer) for layer in candidates if layer not in chosen)
    while True:
        exchanges = (
            _with(tuple(kept for kept in chosen if kept != old), new)
            for old in chosen
            for new in candidates
            if new not in chosen
        )
        better, less = table.best(exchanges, (chosen, cost))
        if less >= cost:
            break
        chosen, cost = better, less
    return chosen if cost[0] <= 1.0 else tuple(range(min(points, len(candidates))))


def _with(layers: tuple[int, ...], new: int) -> tuple[int, ...]:
    return tuple(sorted((*layers, new)))


def fit_constrained(search: Search, unconstrained: Fit, points: int, step: Step = no_step) -> Fit:
    """Fit a scheme with few prune points.

    Args:
        search: The search, which has the statistics of the unpruned model.
        unconstrained: The scheme that it found with all layers. It is returned if it has few enough points.
        points: G, the most layers that may delete.
        step: Called with the progress of the search.

    Raises:
        UnsupportedError: The ratio cannot be reached with so few layers.
    """
    last = search.task.num_layers - 1
    if sum(map(bool, unconstrained.scheme)) <= points and not unconstrained.scheme[last]:
        return unconstrained
    if not last:
        raise UnsupportedError("A decoder of one layer has no place to prune at.", "Export without a recipe.")
    chosen = choose_layers(search.task, search.unpruned, points)
    earliest = tuple(range(min(points, last)))
    if chosen != earliest:
        # Attention moves to the kept tokens, so the choice made on the unpruned model may fail. The first
        # layers save most.
        with suppress(UnsupportedError):
            return search.fit(chosen, step)
    return search.fit(earliest, step)


class _Table:
    """The statistics of the unpruned model, sorted once; arrays are [S, N] for each layer."""

    def __init__(self, task: Task, unpruned: Unpruned) -> None:
        self.task = task
        both = (unpruned.self_, unpruned.cross)
        self.orders = [np.argsort(values, axis=-1, kind="stable") for values in both]
        self.values = [np.take_along_axis(v, o, -1) for v, o in zip(both, self.orders, strict=True)]
        self.totals = [values.sum(-1, keepdims=True) for values in both]

    def best(
        self, sets: Iterable[tuple[int, ...]], found: tuple[tuple[int, ...], Cost] | None = None
    ) -> tuple[tuple[int, ...], Cost]:
        """Return the set of layers with the least cost.

        One evaluation at the best alpha so far refuses most sets.
        """
        best, cost = found or ((), (3.0, 0.0))
        for layers in sets:
            if cost[0] <= 1.0 and self.at(layers, cost[0])[0] > self.task.ratio:
                continue
            other = self.cost(layers)
            if other < cost:
                best, cost = layers, other
        return best, cost

    def cost(self, layers: tuple[int, ...]) -> Cost:
        """Compute the cost of a set of layers, by bisection as in `Search.fit` but finer."""
        ratio, _ = self.at(layers, _STRONGEST)
        if ratio > self.task.ratio:
            return (2.0, ratio)
        low, high = 0.0, _STRONGEST
        for _ in range(_HALVINGS):
            alpha = (low + high) / 2
            if self.at(layers, alpha)[0] <= self.task.ratio:
                high = alpha
            else:
                low = alpha
        return (high, self.at(layers, high)[1])

    def at(self, layers: tuple[int, ...], alpha: float) -> tuple[float, float]:
        """Evaluate one alpha: the fraction of the work kept, and the attention lost, summed over layers."""
        task = self.task
        alive = np.ones(self.values[0].shape[1:], bool)  # [S, N]
        spent, done, lost = 0.0, 0, 0.0
        full = float(task.full)
        for layer in layers:
            left = alive.sum(-1)
            waiting = _mean_work(task, left)
            if spent + (task.num_layers - done) * waiting <= task.ratio * full:
                break
            gone = alive & self._within(0, layer, alive, alpha) & self._within(1, layer, alive, alpha)
            spent += (layer - done) * waiting + _mean(task.work.before_deletion, left)
            alive &= ~gone
            spent += _mean(task.work.after_deletion, alive.sum(-1))
            done = layer + 1
            lost += sum(self._lost(side, layer, gone) for side in range(2))
        spent += (task.num_layers - done) * _mean_work(task, alive.sum(-1))
        return spent / full, lost

    def _within(self, side: int, layer: int, alive: NDArray[np.bool_], alpha: float) -> NDArray[np.bool_]:
        """Return the tokens that one of the two statistics lets go; tokens deleted before count as lost."""
        order = self.orders[side][layer]
        values = np.where(np.take_along_axis(alive, order, -1), self.values[side][layer], 0.0)
        after = np.cumsum(values[:, ::-1], axis=-1)[:, ::-1] - values  # kept if all tokens up to this one go
        enough: NDArray[np.bool_] = after >= (1.0 - alpha) * self.totals[side][layer]
        enough[:, -1] = False
        may = np.empty_like(enough)
        np.put_along_axis(may, order, enough, -1)
        return may

    def _lost(self, side: int, layer: int, gone: NDArray[np.bool_]) -> float:
        """Return the share of one of the two statistics that deleted tokens had, mean over the samples."""
        values = np.where(
            np.take_along_axis(gone, self.orders[side][layer], -1), self.values[side][layer], 0.0
        )
        return float(np.mean(values.sum(-1, keepdims=True) / np.maximum(self.totals[side][layer], 1e-300)))


def _mean_work(task: Task, left: NDArray[np.int64]) -> float:
    return _mean(task.work.layer, left)


def _mean(work: Callable[[int], int], tokens: NDArray[np.int64]) -> float:
    return sum(work(int(count)) for count in tokens) / len(tokens)
