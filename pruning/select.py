"""Operations that turn scores into kept tokens, which the methods share.

They use only operators that TensorRT can build: TopK with K as an input, and Gather. They use no NonZero, and
no shape depends on data. Indices are sorted as float32, which holds them exactly up to 2**24, because
TensorRT 10.3 has no TopK for int64. Counts that depend on K are tensors, so they are float32 too.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

from visprune.pruning.base import Merged

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ascending",
    "cosines",
    "evenly",
    "fence",
    "gather_tokens",
    "last",
    "part",
    "ranks",
    "repeat",
    "top_indices",
    "unless_all",
]

State = TypeVar("State")


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest scores of each row, ascending.

    Args:
        scores: [T, N] float32.
        count: Number of scores; may be symbolic.

    Returns:
        [T, count] int64, ascending.
    """
    return ascending(scores.topk(count, dim=-1).indices)


def last(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Return the scores with padding ranked last, so that it is taken only when no token is left.

    Args:
        scores: [T, N] float32.
        valid: [T, N] bool, False for padding; None if there is none.
    """
    import torch

    return scores if valid is None else scores.masked_fill(~valid, torch.finfo(torch.float32).min)


def ascending(indices: Tensor) -> Tensor:
    """Sort each row of [T, K] int64 indices."""
    return indices.float().topk(indices.shape[-1], dim=-1, largest=False).values.long()


def ranks(scores: Tensor) -> Tensor:
    """Return the rank of each score in its row: 0 for the largest; equal scores rank by position.

    Unlike TopK, `ranks(scores) < count` takes a count that is a tensor and may be 0, and breaks ties the same
    way in every backend.

    Args:
        scores: [T, N] float32.

    Returns:
        [T, N] float32, whole numbers.
    """
    import torch

    position = torch.arange(scores.shape[-1])
    earlier = position.unsqueeze(0) < position.unsqueeze(1)  # [N, N], of row j the columns i < j
    mine, other = scores.unsqueeze(2), scores.unsqueeze(1)
    ahead = (other > mine) | ((other == mine) & earlier)  # [T, N, N]
    return ahead.float().sum(dim=-1)


def cosines(rows: Tensor) -> Tensor:
    """Return the cosine of each two rows: [T, N, X] -> [T, N, N] float32."""
    import torch

    unit = torch.nn.functional.normalize(rows.float(), dim=-1)
    products: Tensor = unit @ unit.transpose(1, 2)
    return products


def evenly(among: Tensor, count: int | Tensor) -> Tensor:
    """Return evenly spaced tokens: of the V tokens of a row those of rank floor((i + 1/2) V / count).

    The token of rank r is one of them if some i in 0 .. count - 1 has floor((i + 1/2) V / count) = r. The
    number of i whose result is at most r is count (r + 1) / V - 1/2, rounded up. So the token is one if this
    number is larger than for rank r - 1.

    Args:
        among: [T, N] bool, the V tokens of each row.
        count: Number of tokens; may be symbolic, or a tensor [1, 1] float32. If it is above V, all V tokens
            are returned.

    Returns:
        [T, N] bool.
    """
    rank = among.float().cumsum(dim=-1) - 1  # [T, N]
    total = among.float().sum(dim=-1, keepdim=True).clamp(min=1.0)  # [T, 1]

    def at_most(rank: Tensor) -> Tensor:
        return ((2 * count * (rank + 1) - total) / (2 * total)).ceil()

    return among & (at_most(rank) > at_most(rank - 1))


def part(count: int, share: float) -> Tensor:
    """Return round(share * count), halves rounded up, at least 1 and at most `count`: [1, 1] float32.

    Args:
        count: A number that may be symbolic.
        share: In (0, 1]; replaced by the nearest fraction with a denominator of at most 100.
    """
    import torch

    exact = Fraction(share).limit_denominator(100)
    whole = torch.full((1, 1), count, dtype=torch.float32)
    rounded = ((2 * exact.numerator * whole + exact.denominator) / (2 * exact.denominator)).floor()
    return rounded.clamp(min=1.0).minimum(whole)


def repeat(step: Callable[[State], tuple[State, Tensor]], state: State, times: int) -> tuple[State, Tensor]:
    """Apply a step a number of times. In an exported graph this is one Scan, whatever the number.

    Args:
        step: Maps a state to the next state, of the same shapes, and an output.
        state: The state before the first step: a tensor, or a tuple of tensors.
        times: Number of steps; at least 1. It may be a symbol, but torch 2.9 takes no expression of symbols.

    Returns:
        The last state, and the outputs [times, ...].
    """
    import torch

    if torch.compiler.is_exporting():
        from torch._higher_order_ops.scan import scan

        last: State
        last, outputs = scan(lambda carry, _: step(carry), state, torch.zeros(times))
        return last, outputs
    collected = []
    for _ in range(times):
        state, output = step(state)
        collected.append(output)
    return state, torch.stack(collected)


def gather_tokens(features: Tensor, indices: Tensor, always_kept: int) -> Tensor:
    """Gather the kept tokens of each tile in order, and flatten the tiles.

    Args:
        features: [T, A + N, Dv]; the first A tokens are always kept.
        indices: [T, K] int64, indices into the N other tokens.
        always_kept: A.

    Returns:
        [T * (A + K), Dv].
    """
    import torch

    tiles, length, width = features.shape
    index = indices + always_kept
    if always_kept:
        index = torch.cat([torch.arange(always_kept).expand(tiles, always_kept), index], dim=1)
    start = torch.arange(tiles).unsqueeze(1) * length  # [T, 1]
    flat: Tensor = features.reshape(tiles * length, width)
    return flat.index_select(0, (index + start).reshape(-1))


def fence(values: Tensor) -> Tensor:
    """Return Q3 + 1.5 (Q3 - Q1) of the last axis, quartiles interpolated linearly: [..., N] -> [..., 1]."""
    largest = values.shape[-1] - 1
    falling = values.topk(largest + 1, dim=-1).values

    def quartile(below: int) -> Tensor:
        # This is the value at below / 4 of the way down. Its place is static, so two slices find it.
        place, rest = divmod(below * largest, 4)
        upper = falling[..., place : place + 1]
        return upper if not rest else upper + (falling[..., place + 1 : place + 2] - upper) * (rest / 4)

    third, first = quartile(1), quartile(3)
    return third + 1.5 * (third - first)


def unless_all(merged: Merged, features: Tensor) -> Merged:
    """Return what a method merged, but all tokens unchanged and in order if it keeps all.

    Args:
        merged: Of K tokens.
        features: [T, N, Dv], the tokens.
    """
    import torch

    kept, count = merged.indices.shape[1], features.shape[1]
    everything = torch.full((1, 1, 1), kept, dtype=torch.float32) == count
    position = torch.arange(kept)
    itself = (position.unsqueeze(1) == torch.arange(count)).float()  # [K, N]
    return Merged(
        features[:, :kept].float().where(everything, merged.tokens),
        position.where(everything[0], merged.indices),
        itself.where(everything, merged.weights),
    )
