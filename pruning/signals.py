"""Signals that a vision encoder can give a pruning method, such as the attention that each token receives.

A signal is computed in float32 from what layers of the tower record of their attention, or from the features.
Layers are counted up to the feature layer, whose output the projector takes. `SIGNALS` is the table of all
signals. A method names those that it needs, and the exported vision encoder puts out these and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from visprune.pruning.select import fence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SIGNALS", "LayerAttention", "Signal", "SignalSizes"]

_FIRST = Fraction(0)
_HALF = Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Record of the attention of one layer of the vision tower.

    Attributes:
        logits: [T, H, rows, n] float32, scaled, before the softmax. The rows are all n queries, or the first.
        prefix_tokens: Tokens before the patches (1 for a CLS).
        skipped_patches: Patches before visual token 0, which the projector does not take.
        keys: [T, H, n, Dh], if a signal reads them.
        cls_feature: [T, Dv], the CLS token in the features, if a signal reads it.
    """

    logits: Tensor | None
    prefix_tokens: int
    skipped_patches: int
    keys: Tensor | None = None
    cls_feature: Tensor | None = None

    def probabilities(self) -> Tensor:
        """Return the softmax of the logits: [T, H, rows, n] float32."""
        assert self.logits is not None
        return self.logits.softmax(dim=-1)

    def over_patches(self, attention: Tensor) -> Tensor:
        """Average over heads, without the prefix: [T, H, n, n] -> [T, patches, patches]."""
        mean: Tensor = attention.mean(dim=1)
        return mean[:, self.prefix_tokens :, self.prefix_tokens :]

    def visual(self, vector: Tensor) -> Tensor:
        """Return the entries of the visual tokens: [T, patches] -> [T, N]."""
        return vector[:, self.skipped_patches :]


@dataclass(frozen=True, slots=True)
class SignalSizes:
    """Sizes that the shapes of signals have.

    Attributes:
        visual_tokens: N.
        feature: Dv, the width of the features.
        heads: Heads of the vision tower.
        head_dim: Dh, the size of a head.
    """

    visual_tokens: int
    feature: int
    heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal: how it is computed, and from which layers.

    Attributes:
        compute: Maps the record of one layer to the signal, in float32.
        reads: The part of the record that it reads: the attention of all queries, that of the first query
            (for which no square matrix is computed), the keys, or the CLS token in the features.
        depth: The layer, as a fraction of the layers up to the feature layer; 1 is the feature layer.
        since: For a signal of several layers, the depth after which they begin, up to the feature layer; None
            for a signal of one layer.
        combine: Maps the stacked results of several layers [L, T, N] to the signal.
        shape: Shape of the signal for one tile.
    """

    compute: Callable[[LayerAttention], Tensor]
    reads: Literal["all", "first", "keys", "cls_feature"] = "all"
    depth: Fraction = Fraction(1)
    since: Fraction | None = None
    combine: Callable[[Tensor], Tensor] | None = None
    shape: Callable[[SignalSizes], tuple[int, ...]] = lambda sizes: (sizes.visual_tokens,)

    @property
    def per_token(self) -> bool:
        """Whether it is one number for each visual token."""
        return self.shape(SignalSizes(2, 3, 3, 3)) == (2,)

    @property
    def needs_cls(self) -> bool:
        """Whether it is of the CLS token, which is the first query."""
        return self.reads in ("first", "cls_feature")

    def layers(self, count: int) -> range:
        """Return the 0-based layers that it reads, of a number of layers up to the feature layer."""
        last = max(1, int(count * self.depth))
        return range(last - 1 if self.since is None else int(count * self.since), last)


def _attention_received(layer: LayerAttention) -> Tensor:
    """Return the mean attention probability that each visual token receives from the patches (FoPru, s_key).

    s[j] = mean_i mean_h softmax(logits)[h, i, j], CLS rows and columns dropped.

    Returns:
        [T, N] float32.
    """
    return layer.visual(layer.over_patches(layer.probabilities()).mean(dim=1))


def _attention_given(layer: LayerAttention) -> Tensor:
    """Return the mean attention probability that each visual token gives to the patches (FoPru, s_qry).

    Returns:
        [T, N] float32.
    """
    return layer.visual(layer.over_patches(layer.probabilities()).mean(dim=2))


def _logits_received(layer: LayerAttention) -> Tensor:
    """Return the attention received, from the logits before the softmax: [T, N] float32."""
    assert layer.logits is not None
    return layer.visual(layer.over_patches(layer.logits).mean(dim=1))


def _attention_map(layer: LayerAttention) -> Tensor:
    """Average the probabilities among visual tokens over heads: [T, N, N] float32, rows are queries."""
    patches = layer.over_patches(layer.probabilities())
    return patches[:, layer.skipped_patches :, layer.skipped_patches :]


def _cls_attention(layer: LayerAttention) -> Tensor:
    """Average the probabilities that the CLS token gives to visual tokens over heads: [T, N] float32."""
    given = layer.probabilities()[:, :, 0].mean(dim=1)  # [T, n]
    return layer.visual(given[:, layer.prefix_tokens :])


def _degree(layer: LayerAttention) -> Tensor:
    """Return the attention that each visual token receives from the other patches (freePruner's r).

    r[i] = sum_j mean_h P[h, j, i] - mean_h P[h, i, i], CLS rows and columns dropped.

    Returns:
        [T, N] float32.
    """
    # Columns are summed before heads are averaged, so that no head's matrix is written a second time.
    probabilities = layer.probabilities()  # [T, H, n, n]
    received = probabilities.sum(dim=2)  # [T, H, n]
    if layer.prefix_tokens:
        received = received - probabilities[:, :, : layer.prefix_tokens].sum(dim=2)
    own = probabilities.flatten(2)[..., :: probabilities.shape[-1] + 1]  # the diagonals
    return layer.visual((received - own).mean(dim=1)[:, layer.prefix_tokens :])


def _relative_degree(layer: LayerAttention) -> Tensor:
    """Return the degree divided by its mean over the visual tokens: [T, N] float32."""
    degree = _degree(layer)
    return degree / degree.mean(dim=-1, keepdim=True)


def _high_degree(layer: LayerAttention) -> Tensor:
    """Return 1.0 where the degree is above Q3 + 1.5 (Q3 - Q1) of the visual tokens, else 0.0: [T, N]."""
    degree = _degree(layer)
    return (degree > fence(degree)).float()


def _keys(layer: LayerAttention) -> Tensor:
    """Return the keys of the visual tokens, the heads side by side: [T, N, H Dh] float32."""
    assert layer.keys is not None
    first = layer.prefix_tokens + layer.skipped_patches
    return layer.keys[:, :, first:].float().transpose(1, 2).flatten(2)


def _mean_keys(layer: LayerAttention) -> Tensor:
    """Average the keys of the visual tokens over heads: [T, N, Dh] float32."""
    assert layer.keys is not None
    return layer.keys[:, :, layer.prefix_tokens + layer.skipped_patches :].float().mean(dim=1)


def _cls_feature(layer: LayerAttention) -> Tensor:
    """Return the CLS token in the features: [T, Dv] float32."""
    assert layer.cls_feature is not None
    return layer.cls_feature.float()


def _mean(stacked: Tensor) -> Tensor:
    """Average over layers: [L, T, N] -> [T, N]."""
    return stacked.mean(dim=0)


def _sum(stacked: Tensor) -> Tensor:
    """Add up over layers: [L, T, N] -> [T, N]."""
    return stacked.sum(dim=0)


def _pairs(sizes: SignalSizes) -> tuple[int, ...]:
    return (sizes.visual_tokens, sizes.visual_tokens)


SIGNALS: Mapping[str, Signal] = {
    "attention_received": Signal(_attention_received),
    "attention_given": Signal(_attention_given),
    "logits_received": Signal(_logits_received),
    "cls_attention": Signal(_cls_attention, reads="first"),
    "attention_map": Signal(_attention_map, shape=_pairs),
    "attention_map_half": Signal(_attention_map, depth=_HALF, shape=_pairs),
    "attention_map_third": Signal(_attention_map, depth=Fraction(1, 3), shape=_pairs),
    "attention_map_quarter": Signal(_attention_map, depth=Fraction(1, 4), shape=_pairs),
    "degree_mean_all": Signal(_relative_degree, since=_FIRST, combine=_mean),
    "degree_mean_half": Signal(_relative_degree, since=_HALF, combine=_mean),
    "degree_votes_all": Signal(_high_degree, since=_FIRST, combine=_sum),
    "degree_votes_half": Signal(_high_degree, since=_HALF, combine=_sum),
    "cls_feature": Signal(_cls_feature, reads="cls_feature", shape=lambda s: (s.feature,)),
    "keys": Signal(_keys, reads="keys", shape=lambda s: (s.visual_tokens, s.heads * s.head_dim)),
    "mean_keys": Signal(_mean_keys, reads="keys", shape=lambda s: (s.visual_tokens, s.head_dim)),
}
