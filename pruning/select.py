"""From scores to kept tokens: the operations every method shares.

Only operators that TensorRT builds are used: TopK with K as an input, Gather; no NonZero, no
data-dependent shape. Indices are sorted as float32, which holds them exactly up to 2**24, because
TensorRT 10.3 has no TopK for int64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gather_tokens", "top_indices"]


def top_indices(scores: Tensor, count: int) -> Tensor:
    """The `count` largest scores of each row, as ascending indices.

    Args:
        scores: [T, N] float32.
        count: How many; may be symbolic.

    Returns:
        [T, count] int64, ascending.
    """
    indices = scores.topk(count, dim=-1).indices  # [T, count], by score
    return indices.float().topk(count, dim=-1, largest=False).values.long()


def gather_tokens(features: Tensor, indices: Tensor, always_kept: int) -> Tensor:
    """Gather kept tokens of each tile, in order, flat over tiles.

    Args:
        features: [T, A + N, Dv]; the first A tokens are kept in any case.
        indices: [T, K] int64 into the N others.
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
