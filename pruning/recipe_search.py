"""FitPrune's search for a recipe, on the attention of samples (arXiv 2409.10197).

Notation: L layers, N visual tokens, n of them left, S samples. For each layer and sample, W_self and W_cross
are the sums of the statistics `Attention` on the unpruned model. One evaluation of an alpha takes all samples
through the decoder, layer by layer; each sample has its own deletions in the layers before:

    1. Before each layer, and once after the last, forecast the visual work: the work spent, and the cost of
       the remaining layers if nothing more is deleted. If it is within ratio * full work (mean over samples),
       the alpha is feasible, and the remaining layers delete nothing.
    2. D_cross is the longest prefix of the tokens, ascending by cross, such that the rest keeps at least
       (1 - alpha) W_cross, and at least one token; D_self likewise. Their intersection is deleted.
    3. scheme[l] = floor(mean over samples of the number deleted).

The search bisects [0, 1] seven times and returns the last feasible scheme. Two shortcuts change no result. An
evaluation ends as soon as it can no longer succeed, even with one token left from there on. The layers before
the first deletion are the same for every alpha, so they are computed once.

This module knows no model and no torch: attention comes from a `recipe_task.FitSample`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from visprune.errors import UnsupportedError
from visprune.pruning.recipe import Fit, scheme_ratio
from visprune.pruning.recipe_task import (
    Attention,
    FitSample,
    Floats,
    Pass,
    Step,
    Task,
    Unpruned,
    no_step,
    rounded_up,
)

__all__ = ["HALVINGS", "Search", "deletable"]

HALVINGS = 7
"""Number of bisections of one search, so alpha is found to 1/128."""

_NONE = np.empty(0, np.int64)


@dataclass(slots=True)
class _Start:
    """The samples at the attention of the first layer that may delete, which all evaluations share."""

    layer: int
    passes: list[Pass]
    attention: list[Attention]


@dataclass(slots=True)
class _Progress:
    """State of an evaluation: lists have an entry for each sample, arrays are [L, S]."""

    layer: int  # the next one
    passes: list[Pass]
    left: list[int]
    spent: list[int]
    deleted: NDArray[np.int64]
    lost_self: Floats
    lost_cross: Floats


class Search:
    """A search for schemes, for one task on one set of samples.

    Args:
        task: The task.
        samples: Samples, with the number of visual tokens that the task has.
        step: Called with the progress of the statistics of the unpruned model, L * S steps.

    Raises:
        UnsupportedError: The ratio cannot be reached whatever is deleted.
    """

    def __init__(self, task: Task, samples: Sequence[FitSample], step: Step = no_step) -> None:
        self.task = task
        self.samples = len(samples)
        task.check_possible(range(task.num_layers))
        shape = (task.num_layers, self.samples, task.visual_tokens)
        self.unpruned = Unpruned(np.empty(shape), np.empty(shape))
        start: list[Pass] = []
        attention: list[Attention] = []
        for index, sample in enumerate(samples):
            one = sample.start()
            for layer in range(task.num_layers):
                found = one.attend(layer)
                self.unpruned.self_[layer, index], self.unpruned.cross[layer, index] = found
                if layer == 0:
                    start.append(one.copy())
                    attention.append(found)
                step(index * task.num_layers + layer + 1, self.samples * task.num_layers)
        self._start = _Start(0, start, attention)
        self._totals = (self.unpruned.self_.sum(-1), self.unpruned.cross.sum(-1))  # W, [L, S]

    def fit(self, allowed: Collection[int] | None = None, step: Step = no_step) -> Fit:
        """Search the smallest alpha that reaches the ratio.

        Args:
            allowed: The layers that may delete; None for all.
            step: Called with the progress of the search.

        Raises:
            UnsupportedError: No alpha reaches the ratio; the message names the ratio that can be reached.
        """
        layers = frozenset(range(self.task.num_layers) if allowed is None else allowed)
        self.task.check_possible(layers)
        start = self._started(min(layers))
        low, high, best = 0.0, 1.0, None
        total = HALVINGS * self.task.num_layers
        for turn in range(HALVINGS):
            alpha = (low + high) / 2
            step(turn * self.task.num_layers, total)
            found = self._evaluate(
                alpha, layers, start, partial(_advance, step, turn * self.task.num_layers, total)
            )
            if self._met(found):
                high, best = alpha, found
            else:
                low = alpha
        if best is None:
            raise self._unreachable(low, layers, start)
        step(total, total)
        return self._finished(best, high, start)

    def _evaluate(
        self,
        alpha: float,
        layers: frozenset[int],
        start: _Start,
        step: Callable[[int], None] = lambda layer: None,
        *,
        abandon: bool = True,
    ) -> _Progress:
        """Evaluate one alpha, until the budget is met, cannot be met, or the last layer is done."""
        task = self.task
        shape = (task.num_layers, self.samples)
        now = _Progress(
            layer=0,
            passes=[one.copy() for one in start.passes],
            left=[task.visual_tokens] * self.samples,
            spent=[0] * self.samples,
            deleted=np.zeros(shape, np.int64),
            lost_self=np.zeros(shape),
            lost_cross=np.zeros(shape),
        )
        for layer in range(task.num_layers):
            now.layer = layer
            step(layer)
            if self._met(now) or (abandon and self._least(now, layers) > self._budget):
                return now
            self._layer(now, alpha if layer in layers else None, start)
        now.layer = task.num_layers
        return now

    def _layer(self, now: _Progress, alpha: float | None, start: _Start) -> None:
        """Run one layer of every sample, with deletions unless `alpha` is None."""
        layer, work = now.layer, self.task.work
        for index, one in enumerate(now.passes):
            entered = now.left[index]
            if layer >= start.layer:
                attention = start.attention[index] if layer == start.layer else one.attend(layer)
                totals = (float(self._totals[0][layer, index]), float(self._totals[1][layer, index]))
                gone = _NONE if alpha is None else deletable(attention, totals, alpha)
                now.lost_self[layer, index] = _lost(attention.self_, gone, totals[0])
                now.lost_cross[layer, index] = _lost(attention.cross, gone, totals[1])
                if gone.size:
                    one.delete(gone)
                    now.left[index] -= gone.size
                    now.deleted[layer, index] = gone.size
            now.spent[index] += work.before_deletion(entered) + work.after_deletion(now.left[index])
        now.layer = layer + 1

    @property
    def _budget(self) -> float:
        return self.task.ratio * (self.task.full * self.samples)

    def _met(self, now: _Progress) -> bool:
        return self._forecast(now) <= self._budget

    def _forecast(self, now: _Progress) -> int:
        """Return the work of all samples if nothing more is deleted."""
        return sum(now.spent) + sum(self.task.forecast(tokens, now.layer) for tokens in now.left)

    def _least(self, now: _Progress, layers: frozenset[int]) -> int:
        """Return the work of all samples if the next layer that may delete leaves one token."""
        return sum(now.spent) + sum(self.task.least(tokens, now.layer, layers) for tokens in now.left)

    def _started(self, layer: int) -> _Start:
        """Return the samples at the attention of `layer`, with nothing deleted."""
        passes = [one.copy() for one in self._start.passes]
        attention = self._start.attention
        for index in range(1, layer + 1):
            attention = [one.attend(index) for one in passes]
        return _Start(layer, passes, attention)

    def _finished(self, best: _Progress, alpha: float, start: _Start) -> Fit:
        """Measure the remaining layers, whose few tokens cost little, and put the result together."""
        task = self.task
        on_samples = self._forecast(best) / (task.full * self.samples)
        while best.layer < task.num_layers and best.deleted.any():
            self._layer(best, None, start)
        # Every sample keeps a token, so the scheme leaves one too.
        scheme = tuple(int(count) // self.samples for count in best.deleted.sum(-1))
        return Fit(
            scheme=scheme,
            alpha=alpha,
            ratio_on_samples=on_samples,
            ratio_reached=scheme_ratio(scheme, task.visual_tokens, task.work),
            lost_self=tuple(map(float, best.lost_self.mean(-1))),
            lost_cross=tuple(map(float, best.lost_cross.mean(-1))),
        )

    def _unreachable(self, alpha: float, layers: frozenset[int], start: _Start) -> UnsupportedError:
        found = self._evaluate(alpha, layers, start, abandon=False)
        reached = self._forecast(found) / (self.task.full * self.samples)
        more = "" if len(layers) == self.task.num_layers else ", or allow more prune points"
        return UnsupportedError(
            f"{self.task.ratio:g} of the visual work cannot be reached on these samples: even alpha "
            f"{alpha:.3f} keeps {reached:.4f}.",
            f"Ask for a ratio of at least {rounded_up(reached)}{more}.",
        )


def _advance(step: Step, done: int, total: int, layer: int) -> None:
    step(done + layer, total)


def deletable(attention: Attention, totals: tuple[float, float], alpha: float) -> NDArray[np.int64]:
    """Return the tokens that may be deleted, ascending: those that visual tokens and text attend to least.

    Args:
        attention: Statistics of the n tokens left.
        totals: W_self and W_cross.
        alpha: Share of either total that may be lost.
    """
    by_self = _prefix(attention.self_, totals[0], alpha)
    both: NDArray[np.int64] = np.intersect1d(by_self, _prefix(attention.cross, totals[1], alpha))
    return both


def _prefix(values: Floats, total: float, alpha: float) -> NDArray[np.int64]:
    """Return the longest prefix, ascending by value, whose rest keeps its share and at least one token."""
    order = np.argsort(values, kind="stable")
    rest = np.cumsum(values[order][::-1])[::-1]  # rest[k] is kept if k tokens go, k = 0 .. n - 1
    enough = int(np.count_nonzero(rest >= (1.0 - alpha) * total))
    return order[: max(0, enough - 1)]


def _lost(values: Floats, gone: NDArray[np.int64], total: float) -> float:
    """Return the share of attention that is lost: 1 - rest / W."""
    rest = float(values.sum() - values[gone].sum())
    return 1.0 - rest / total if total > 0 else 0.0
