"""Choice of the next token from the logits of one position.

The filters and their order are those of transformers' logits processors: repetition penalty, temperature,
top-k, top-p. A constraint forbids tokens before all of them. This module knows nothing of models, text or
stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from visprune.errors import BundleError, UsageError
from visprune.runtime.backends.runner import Ranked
from visprune.runtime.structured import Constraint

__all__ = ["Sampler", "Sampling", "probabilities"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits. With 0, the most probable token is always chosen (greedy).
        top_k: Keep the k most probable tokens, and those that tie with the last of them; 0 keeps all.
        top_p: Keep the fewest most probable tokens whose probabilities add up to p or more; 1 keeps all.
        repetition_penalty: Above 1, makes every token of the prompt and of the answer so far less probable:
            a positive logit is divided by the penalty, a negative one multiplied.
        seed: The same seed gives the same tokens; None takes a new one.

    Raises:
        UsageError: A value is outside its range, or has no effect because the temperature is 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails each comparison.
        if not 0.0 <= self.temperature < inf:
            raise _out_of_range("temperature", self.temperature, "0 (greedy) or above")
        if not self.top_k >= 0:
            raise _out_of_range("top_k", self.top_k, "0 (all tokens) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise _out_of_range("top_p", self.top_p, "above 0 and at most 1")
        if not 0.0 < self.repetition_penalty < inf:
            raise _out_of_range("repetition_penalty", self.repetition_penalty, "above 0; 1 has no effect")
        if self.seed is not None and self.seed < 0:
            raise _out_of_range("seed", self.seed, "0 or above")
        if self.temperature == 0.0:
            for name, default in (("top_k", 0), ("top_p", 1.0), ("seed", None)):
                if getattr(self, name) != default:
                    raise UsageError(
                        f"The {name} has no effect at temperature 0.",
                        "Add a temperature, for example 0.7, or leave it out.",
                    )


class Sampler:
    """Draws tokens one after another, with its own random generator.

    Args:
        sampling: The settings.
        constraint: Forbids tokens, and is told of each one that was chosen; None allows all.
    """

    def __init__(self, sampling: Sampling, constraint: Constraint | None = None) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._random = np.random.default_rng(sampling.seed)

    def __call__(
        self, logits: NDArray[np.float32] | Ranked, history: Sequence[int] | NDArray[np.int64]
    ) -> int:
        """Choose the next token.

        Args:
            logits: [V], float32 (or float16); or [1, 1, V] in a backend's array that knows their largest. The
                logits of such an array are read only if the largest is not enough.
            history: Ids of the prompt and of the tokens generated so far.

        Returns:
            A token id. If the largest logits are equal, greedy takes the lowest id, as torch does.

        Raises:
            BundleError: The logits contain NaN or +inf, or are all -inf.
            UnsupportedError: The constraint allows no token.
        """
        if self._constraint is None:
            return self._choose(logits, history)
        scores = logits if isinstance(logits, np.ndarray) else logits.numpy()[0, -1]
        token = self._choose(self._constraint.mask(scores), history)
        self._constraint.accept(token)
        return token

    def _choose(
        self, logits: NDArray[np.float32] | Ranked, history: Sequence[int] | NDArray[np.int64]
    ) -> int:
        if not isinstance(logits, np.ndarray):
            if self._sampling.temperature == 0.0 and self._sampling.repetition_penalty == 1.0:
                return _usable(logits.argmax(), "not a finite number")
            scores: NDArray[np.float32] = logits.numpy()[0, -1]
        else:
            scores = logits
        if self._sampling.temperature == 0.0:
            return _best(_penalised(scores, history, self._sampling.repetition_penalty))
        kept, weights = _candidates(scores, history, self._sampling)
        cumulative = np.cumsum(weights)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(kept[min(int(drawn), np.flatnonzero(weights)[-1])])  # rounding may reach the very end


def probabilities(
    logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int64], sampling: Sampling
) -> NDArray[np.float64]:
    """Return the distribution that `Sampler` draws from.

    Args:
        logits: [V], float32 (or float16).
        history: Ids of the prompt and of the tokens generated so far.
        sampling: The settings; the seed has no effect.

    Returns:
        Probabilities [V], float64, with sum 1. At temperature 0, one of them is 1.

    Raises:
        BundleError: The logits contain NaN or +inf, or are all -inf.
    """
    result = np.zeros(logits.shape, dtype=np.float64)
    if sampling.temperature == 0.0:
        result[_best(_penalised(logits, history, sampling.repetition_penalty))] = 1.0
        return result
    kept, weights = _candidates(logits, history, sampling)
    result[kept] = weights / weights.sum()
    return result


def _penalised(
    logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int64], penalty: float
) -> NDArray[np.float32]:
    if penalty == 1.0:
        return logits
    ids = np.asarray(history, dtype=np.int64)
    ids = ids[ids < logits.size]  # an embedding may have more rows than the head, for placeholders
    scores = logits.astype(np.float32)  # a copy
    seen = scores[ids]
    scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)  # an id seen twice is penalised once
    return scores


def _best(scores: NDArray[np.float32]) -> int:
    best = int(np.argmax(scores))  # the first of equals; a NaN counts as the largest
    return _usable(best if np.isfinite(scores[best]) else -1, str(scores[best]))


def _usable(best: int, largest: str) -> int:
    if best < 0:
        raise BundleError(
            f"The decoder gave logits that cannot be used: the largest is {largest}.",
            "If this bundle is fp16, its activations may overflow: export with --dtype fp32.",
        )
    return best


def _candidates(
    logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int64], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the ids that the filters keep, ascending, and their weights, proportional to probabilities."""
    scores = _penalised(logits, history, sampling.repetition_penalty)
    largest = scores[_best(scores)]
    if 0 < sampling.top_k < scores.size:
        kept = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
    else:
        kept = np.arange(scores.size)
    # The largest is subtracted first, so that a small temperature underflows to 0 instead of overflowing.
    weights = np.exp((scores[kept].astype(np.float64) - largest) / sampling.temperature)
    if sampling.top_p < 1.0:
        survivors = _nucleus(weights / weights.sum(), sampling.top_p)
        kept, weights = kept[survivors], weights[survivors]
    return kept, weights


def _nucleus(chances: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Return the positions, ascending, of the fewest largest probabilities that add up to `top_p` or more."""
    # Probabilities below this bound add up to less than 1 - p, so they are dropped without being sorted.
    large = np.flatnonzero(chances >= (1.0 - top_p) / chances.size)
    order = large[np.argsort(chances[large], kind="stable")]
    below = np.cumsum(chances[order]) + (1.0 - chances[order].sum())
    dropped = np.searchsorted(below, 1.0 - top_p, side="right")  # transformers drops where below <= 1 - p
    return np.sort(order[min(int(dropped), order.size - 1) :])


def _out_of_range(name: str, value: float, wanted: str) -> UsageError:
    return UsageError(f"The {name} is {value}.", f"Give a value of {wanted}.")
