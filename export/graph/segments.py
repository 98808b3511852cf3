"""The segments of a decoder, and the pruner that drops tokens between them.

Places in a decoder of L layers are counted in half layers: 2 l is before the attention block of layer l,
2 l + 1 is between its attention block and its MLP, and 2 L is the end. A cut is at one such place. Only the
residual stream crosses a cut, so one graph serves a segment in the prefill and in decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from visprune.errors import UsageError
from visprune.export.graph.attention import Recorder
from visprune.export.graph.graphs import symbolic_size
from visprune.export.graph.layers import GraphCache, attend, causal_mask, feed_forward
from visprune.export.models.parts import Parts
from visprune.pruning.base import LayerPruner
from visprune.pruning.select import top_indices

__all__ = ["Segment", "SegmentPruner", "attention_layers", "cuts_of", "even_cuts", "span_layers", "spans"]


def cuts_of(pruner: LayerPruner, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the cuts of a method that prunes at these layers: in each layer or after it, as it asks."""
    return tuple(2 * layer + (1 if pruner.boundary == "attention" else 2) for layer in layers)


def even_cuts(num_layers: int, segments: int) -> tuple[int, ...]:
    """Return the cuts between layers that make segments whose sizes differ by one layer at most.

    Raises:
        UsageError: The number of segments is less than 1 or larger than the number of layers.
    """
    if not 1 <= segments <= num_layers:
        raise UsageError(
            f"A decoder of {num_layers} layers cannot be cut into {segments} segments.",
            f"Give a number from 1 to {num_layers}.",
        )
    return tuple(2 * (num_layers * part // segments) for part in range(1, segments))


def spans(num_layers: int, cuts: Sequence[int]) -> list[range]:
    """Return the half layers of each segment."""
    return [range(start, stop) for start, stop in pairwise((0, *cuts, 2 * num_layers))]


def attention_layers(span: range) -> list[int]:
    """Return the layers whose attention block, and therefore whose cache, is in a segment."""
    return [half // 2 for half in span if half % 2 == 0]


def span_layers(span: range) -> list[int]:
    """Return the layers of which at least one half is in a segment."""
    return sorted({half // 2 for half in span})


class Segment(nn.Module):
    """A part of the decoder.

    inputs_embeds or hidden_states [B, S, D], position_ids, past -> last_hidden_state or logits, present.

    If a prune point follows, `is_visual` [B, S] is another input, and so is `is_rater` [B, S] for a method
    with raters; `token_scores` [B, S] float32 is the output after the hidden states.
    """

    def __init__(self, parts: Parts, span: range, pruner: LayerPruner | None) -> None:
        super().__init__()
        model: Any = parts.language_model
        self.span, self.pruner = span, pruner
        self.layers = nn.ModuleDict()
        for index in span_layers(span):
            names = ["input_layernorm", "self_attn"] if 2 * index in span else []
            names += ["post_attention_layernorm", "mlp"] if 2 * index + 1 in span else []
            self.layers[str(index)] = _pick(model.layers[index], names)
        self.rotary_emb = model.rotary_emb
        self.is_last = span.stop == 2 * len(model.layers)
        if self.is_last:
            self.norm, self.lm_head = model.norm, parts.lm_head
        if pruner is not None and pruner.boundary == "layer":
            self.scoring_layer = _pick(model.layers[span.stop // 2], ["input_layernorm", "self_attn"])

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
        is_visual: Tensor | None = None,
        is_rater: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the half layers; compute scores at the end if a prune point follows."""
        length, before = hidden.shape[1], past[0].shape[2]
        mask = causal_mask(length, before, hidden.dtype)
        cache = GraphCache(past, attention_layers(self.span)[0])
        rotary = self.rotary_emb(hidden, position_ids)
        recorder = _recorder(self.pruner, is_rater) if self.pruner else None
        for half in self.span:
            layer = self.layers[str(half // 2)]
            if half % 2:
                hidden = feed_forward(layer, hidden)
            else:
                scored = recorder if half == self.span.stop - 1 else None
                hidden = attend(layer, hidden, rotary, mask, cache, scored)
        if self.is_last:
            return (self.lm_head(self.norm(hidden[:, -1:])), *cache.present)
        if self.pruner is None or recorder is None or is_visual is None:
            return (hidden, *cache.present)
        if self.pruner.boundary == "layer":
            # Only the recorded attention is used, so the graph does not contain the rest of that layer.
            attend(self.scoring_layer, hidden, rotary, mask[..., before:], None, recorder)
        attention = recorder.value
        if not recorder.reduces:
            attention = attention.softmax(dim=-1)
            attention = attention.mean(dim=1) if self.pruner.heads == "mean" else attention.amax(dim=1)
        scores = self.pruner.score(attention[..., -length:], is_visual)
        return (hidden, scores, *cache.present)


def _recorder(pruner: LayerPruner, is_rater: Tensor | None) -> Recorder:
    """Return a recorder of the attention that a method reads."""
    if pruner.rows != "raters":
        return Recorder(pruner.rows, maximum=pruner.rows == "all" and pruner.heads == "max")
    rates = cast("Tensor", is_rater).float()  # [B, S]
    count = rates.sum(dim=1, keepdim=True)
    is_last = torch.arange(rates.shape[1]) == rates.shape[1] - 1
    return Recorder(weights=torch.where(count > 0, rates / count.clamp(min=1.0), is_last.float()))


def _pick(layer: nn.Module, names: Sequence[str]) -> nn.ModuleDict:
    """Return some submodules of a layer under their own names."""
    return nn.ModuleDict({name: layer.get_submodule(name) for name in names})


class SegmentPruner(nn.Module):
    """The pruner between segments: it keeps all text tokens and the visual tokens of largest score.

    hidden_states [B, S, D], position_ids [B, S], is_visual [B, S], token_scores [B, S], keep_tokens [],
    and is_rater [B, S] for a method with raters -> all but scores and count with S' = keep_tokens, named
    `kept_...`, and keep_indices [B, S'] ascending.

    One graph serves every prune point. The count includes text tokens, because a count that depended on
    `is_visual` would make a shape depend on data.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        is_visual: Tensor,
        token_scores: Tensor,
        keep_tokens: Tensor,
        is_rater: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Select the tokens and gather their values."""
        count = symbolic_size(keep_tokens, hidden_states.shape[1])
        highest = torch.finfo(token_scores.dtype).max
        scores = torch.where(is_visual, token_scores, highest)
        indices = top_indices(scores, count)  # [B, S'], B = 1
        kept = indices[0]
        values = [hidden_states, position_ids, is_visual, *([] if is_rater is None else [is_rater])]
        return (*(tensor.index_select(1, kept) for tensor in values), indices)
