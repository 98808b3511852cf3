"""Definitions of methods in float64, with loops and sorting, for any number of tokens.

They share no code with the product. Each takes one tile: its tokens [N, D], what else the method reads, K,
and the indices of those tokens that are no padding. Each checks that the last token it keeps is clearly ahead
of the first that it drops.
"""

from __future__ import annotations

import numpy as np

__all__ = ["best", "cdpruner", "dart", "holov"]


def best(scores, count, among, margin=1e-7):
    """Indices of the `count` largest of `among`, clearly larger than the others; the largest first."""
    order = sorted(among, key=lambda j: -scores[j])
    if 0 < count < len(order):
        assert scores[order[count - 1]] - scores[order[count]] > margin
    return order[:count]


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def dart(tokens, question, keep, among, image_pivots=4, text_pivots=4):
    size = np.abs(tokens.astype(np.float64)).sum(1)
    if keep < image_pivots:
        return sorted(best(size, keep, among))
    pivots = best(size, image_pivots, among)
    words = sorted(range(len(question)), key=lambda j: -np.abs(question[j].astype(np.float64)).sum())
    words = [words[i % len(words)] for i in range(text_pivots)]
    kept, rows = list(pivots), [*unit(tokens[pivots]), *unit(question[words])]
    for turn, row in enumerate(rows, start=1):
        count = (keep - image_pivots) // len(rows)
        if turn == len(rows):
            count = keep - len(kept)
        kept += best(-(unit(tokens) @ row), count, [j for j in among if j not in kept])
    return sorted(kept)


def holov(tokens, attention, keep, among, crops=16, share=0.09):
    parts = [list(part) for part in np.array_split(np.arange(len(tokens)), min(crops, len(tokens)))]
    parts = [[j for j in part if j in among] for part in parts]
    scores = [crop_score(tokens[part], attention[part], share) if part else 0.0 for part in parts]
    shares = np.array(scores) / sum(scores)
    exact = shares * keep
    if len(parts) > 1 and keep < len(among):
        assert all(value == 0 or abs(value - round(value)) > 1e-6 for value in exact)
    quotas = [int(np.floor(value)) for value in exact]
    order = sorted(range(len(parts)), key=lambda c: -shares[c])
    for c in order[: keep - sum(quotas)]:
        quotas[c] += 1
    surplus = 0
    for c in [*order, *order]:
        wanted = quotas[c] + surplus
        quotas[c] = min(wanted, len(parts[c]))
        surplus = wanted - quotas[c]
    assert surplus == 0
    kept = [best(attention, quota, part, 1e-9) for part, quota in zip(parts, quotas, strict=True)]
    return sorted(j for part in kept for j in part)


def crop_score(tokens, attention, share):
    """Mean over a crop of 1000 attention and the rescaled variance."""
    attention, count, variances = 1000 * attention.astype(np.float64), len(tokens), []
    rows = unit(tokens)
    for i in range(count):
        row = [0.0 if j == i else rows[i] @ rows[j] for j in range(count)]
        mean = sum(row) / max(1, count - 1)
        variances.append(sum((value - mean) ** 2 for value in row) / max(1, count - 1))
    scale = attention.mean() / (np.mean(variances) + 1e-6)
    return np.mean([a + share * v * scale for a, v in zip(attention, variances, strict=True)])


def cdpruner(tokens, question, keep, among, sign=-1):
    """Greedy picks, by the length of what is left of each token outside the picks' span (Gram-Schmidt)."""
    if keep == len(among):
        return sorted(among)
    rows = unit(tokens)[among]
    relevance = sign * (rows @ unit(question).T).mean(1)
    spread = relevance.max() - relevance.min()
    weight = ((relevance - relevance.min() + 1e-6) / (spread or 1.0)) ** 2
    left, picked = np.ones(len(rows)), []
    basis = np.zeros((keep, rows.shape[1]))
    for _ in range(keep):
        gains = np.where(left < 1e-5, 0.0, weight * left)
        gains[picked] = -1.0
        pick = int(np.argmax(gains))
        if len(picked) == keep - 1 and gains[pick] > 0:
            assert gains[pick] > (1 + 1e-5) * np.delete(gains, pick).max()
        picked.append(pick)
        if left[pick] >= 1e-5:
            found = basis[: len(picked) - 1]
            outside = rows[pick] - found.T @ (found @ rows[pick])
            basis[len(picked) - 1] = outside / np.linalg.norm(outside)
            left -= (rows @ basis[len(picked) - 1]) ** 2
    return sorted(among[j] for j in picked)
