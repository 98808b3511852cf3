"""The methods that merge tokens in NumPy: each definition in float64, with loops and sorting.

They share no code with the product. Each returns what it makes of one tile: the patches that the tokens stand
for [K], with -1 for the CLS token, the tokens [K, Dv], and the weights of the patches in them [K, N].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

__all__ = ["downsample", "prumerge", "visionzip"]


def visionzip(features, attention, mean_keys, keep, tokens=None, share=Fraction(27, 32), cls=None):
    """VisionZip; `tokens` are those that are no padding, and `cls` is the CLS token if it is one of them."""
    tokens = range(len(features)) if tokens is None else tokens
    if keep == len(features):
        return _made(features, [(j, {}) for j in range(keep)])
    dominant = _rounded(share, keep)
    chosen = best(attention, dominant - (cls is not None), tokens)
    rest = [j for j in tokens if j not in chosen]
    contextual = keep - dominant
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    joined = {target: [] for target in targets}
    alike = _cosines(mean_keys)
    for j in rest:
        if targets and j not in targets:
            joined[best(alike[j], 1, targets)[0]].append(j)
    sums = [(j, {}) for j in chosen]
    sums += [(target, dict.fromkeys(members, 1 / max(1, len(members)))) for target, members in joined.items()]
    return _made(features, sums, cls)


def prumerge(features, attention, keys, keep, tokens=None, share=Fraction(1, 4), neighbours=32):
    """PruMerge+ with a fixed count; `tokens` are those that are no padding."""
    tokens = range(len(features)) if tokens is None else tokens
    if keep == len(features):
        return _made(features, [(j, {}) for j in range(keep)])
    chosen = best(attention, _rounded(share, keep), tokens)
    rest = [j for j in tokens if j not in chosen]
    spaced = min(keep - _rounded(share, keep), len(rest))
    chosen += [rest[(2 * i + 1) * len(rest) // (2 * spaced)] for i in range(spaced)]
    alike = _cosines(keys)
    sums = []
    for patch in sorted(chosen):
        nearest = best(alike[patch], neighbours, [j for j in tokens if j != patch])
        sums.append((patch, {j: attention[j] for j in nearest}))
    return _made(features, sums)


def downsample(features, keep):
    """Adaptive average pooling, as PyTorch has it."""
    whole, side = math.isqrt(len(features)), math.isqrt(keep)
    grid = torch.from_numpy(features.astype(np.float64)).reshape(whole, whole, -1).permute(2, 0, 1)
    pooled = torch.nn.AdaptiveAvgPool2d(side)(grid).permute(1, 2, 0).reshape(keep, -1).numpy()
    bins = [range(i * whole // side, -(-(i + 1) * whole // side)) for i in range(side)]
    middles = [int((i + 0.5) * whole / side) for i in range(side)]
    weights = np.zeros((side, side, whole, whole))
    for row in range(side):
        for column in range(side):
            weights[row, column][np.ix_(bins[row], bins[column])] = 1 / len(bins[row]) / len(bins[column])
    indices = [row * whole + column for row in middles for column in middles]
    return np.array(indices), pooled, weights.reshape(keep, -1)


def best(scores, count: int, among: Sequence[int]) -> list[int]:
    """Return the indices of the `count` largest, and check that they are clearly larger than the others."""
    order = sorted(among, key=lambda j: -scores[j])
    if 0 < count < len(order):
        assert scores[order[count - 1]] - scores[order[count]] > 1e-7
    return sorted(order[: max(0, count)])


def _rounded(share: Fraction, count: int) -> int:
    return min(count, max(1, math.floor(share * count + Fraction(1, 2))))


def _cosines(keys):
    unit = keys.astype(np.float64) / np.linalg.norm(keys.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


def _made(features, sums, cls=None):
    """Add shares of other patches to patches, behind the CLS token if there is one."""
    indices, tokens, weights = [], [], np.zeros((len(sums), len(features)))
    for row, (patch, shares) in enumerate(sums):
        weights[row, patch] = 1.0
        for other, share in shares.items():
            weights[row, other] = share
        added = sum(share * features[j].astype(np.float64) for j, share in shares.items())
        indices.append(patch)
        tokens.append(features[patch] + added)
    if cls is not None:
        indices, tokens = [-1, *indices], [cls, *tokens]
        weights = np.concatenate([np.zeros((1, len(features))), weights])
    return np.array(indices), np.array(tokens), weights
