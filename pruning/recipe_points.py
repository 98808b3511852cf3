"""Where to delete when only a few layers may: the layers of a constrained FitPrune recipe.

Each prune point is a cut of the decoder, and each segment costs start-up and memory, so a board may want
few. Which layers serve best is decided on the attention of the *unpruned* model, kept from the first pass
over the samples: a deletion is taken to cost each later layer what its tokens had there. So thousands of
evaluations take seconds, and no model. The scheme itself is then fitted with true attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from visprune.errors import UnsupportedError
from visprune.pruning.recipe import Fit
from visprune.pruning.recipe_search import Search
from visprune.pruning.recipe_task import Step, Task, Unpruned

__all__ = ["choose_layers", "fit_constrained"]

_HALVINGS = 12
_STRONGEST = 1.0 - 2.0**-_HALVINGS

Cost = tuple[float, float]
"""The smallest alpha that reaches the ratio and the mass lost there; alpha is 2 where none does, and then
the work that is left takes the second place. Less is better."""


def choose_layers(task: Task, unpruned: Unpruned, points: int) -> tuple[int, ...]:
    """The layers that reach a ratio with the smallest alpha, ties by lost mass.

    Layers are added one by one, each time the one that helps most; then single ones are exchanged for as
    long as that helps. The last layer is never one of them, as nothing follows it.

    Args:
        task: What is searched for.
        unpruned: The statistics.
        points: G, the most layers.

    Returns:
        At most G layers, ascending; the first G where no choice reaches the ratio on these statistics.
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


def fit_constrained(
    search: Search, unconstrained: Fit, points: int, step: Step = lambda done, total: None
) -> Fit:
    """A fit with few prune points.

    Args:
        search: Has the statistics of the unpruned model.
        unconstrained: What it found with all layers; taken as it is where it has few enough already.
        points: G, the most layers that may delete.
        step: Told how far the search is.

    Raises:
        UnsupportedError: The ratio cannot be reached with so few.
    """
    last = search.task.num_layers - 1
    if sum(map(bool, unconstrained.scheme)) <= points and not unconstrained.scheme[last]:
        return unconstrained
    if not last:
        raise UnsupportedError("A decoder of one layer has no place to prune at.", "Export without a recipe.")
    chosen = choose_layers(search.task, search.unpruned, points)
    earliest = tuple(range(min(points, last)))
    if chosen != earliest:
        # Attention moves to the survivors, so what the unpruned model promises may not come true. The
        # first layers save most.
        with suppress(UnsupportedError):
            return search.fit(chosen, step)
    return search.fit(earliest, step)


class _Table:
    """The statistics, sorted once; arrays are [S, N] for each layer."""

    def __init__(self, task: Task, unpruned: Unpruned) -> None:
        self.task = task
        both = (unpruned.self_, unpruned.cross)
        self.orders = [np.argsort(values, axis=-1, kind="stable") for values in both]
        self.values = [np.take_along_axis(v, o, -1) for v, o in zip(both, self.orders, strict=True)]
        self.totals = [values.sum(-1, keepdims=True) for values in both]

    def best(
        self, sets: Iterable[tuple[int, ...]], found: tuple[tuple[int, ...], Cost] | None = None
    ) -> tuple[tuple[int, ...], Cost]:
        """The set of least cost; most are refused by one evaluation at the best alpha so far."""
        best, cost = found or ((), (3.0, 0.0))
        for layers in sets:
            if cost[0] <= 1.0 and self.at(layers, cost[0])[0] > self.task.ratio:
                continue
            other = self.cost(layers)
            if other < cost:
                best, cost = layers, other
        return best, cost

    def cost(self, layers: tuple[int, ...]) -> Cost:
        """By halving, as in the search proper, and finer."""
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
        """One alpha: the fraction of the work kept, and the mass lost, summed over layers."""
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
            lost += sum(self._gone(side, layer, gone) for side in range(2))
        spent += (task.num_layers - done) * _mean_work(task, alive.sum(-1))
        return spent / full, lost

    def _within(self, side: int, layer: int, alive: NDArray[np.bool_], alpha: float) -> NDArray[np.bool_]:
        """The tokens that may go by one of the two statistics; those gone before count as lost."""
        order = self.orders[side][layer]
        values = np.where(np.take_along_axis(alive, order, -1), self.values[side][layer], 0.0)
        after = np.cumsum(values[:, ::-1], axis=-1)[:, ::-1] - values  # what is kept if all up to here go
        enough: NDArray[np.bool_] = after >= (1.0 - alpha) * self.totals[side][layer]
        enough[:, -1] = False
        may = np.empty_like(enough)
        np.put_along_axis(may, order, enough, -1)
        return may

    def _gone(self, side: int, layer: int, gone: NDArray[np.bool_]) -> float:
        values = np.where(
            np.take_along_axis(gone, self.orders[side][layer], -1), self.values[side][layer], 0.0
        )
        return float(np.mean(values.sum(-1, keepdims=True) / np.maximum(self.totals[side][layer], 1e-300)))


def _mean_work(task: Task, left: NDArray[np.int64]) -> float:
    return _mean(task.work.layer, left)


def _mean(work: Callable[[int], int], tokens: NDArray[np.int64]) -> float:
    return sum(work(int(count)) for count in tokens) / len(tokens)
