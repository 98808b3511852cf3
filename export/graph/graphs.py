"""The modules that are traced into graphs: thin wrappers around the checkpoint's own modules.

Each wrapper is built twice. Built of weightless modules, it is traced. Built of the checkpoint's modules, it
is the source of the graph's weights, which have the same names, and the reference of the self-check.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from visprune.export.graph.attention import Recorder, recording
from visprune.export.graph.layers import GraphCache, causal_mask
from visprune.export.models.parts import Features, Parts
from visprune.pruning.base import RatingPruner, VisionPruner
from visprune.pruning.select import gather_tokens
from visprune.pruning.signals import SIGNALS, LayerAttention

__all__ = ["Decoder", "Embedding", "Pruner", "TokenPruner", "VisionEncoder", "symbolic_size"]


class VisionEncoder(nn.Module):
    """The vision tower as far as the projector's features, with the signals that a pruning method reads.

    pixel_values [T, 3, H, W] -> image_features [T, A + N, Dv], then each signal, [T, N] or [T, N, N].

    Layers after the last one that the projector takes are left out. A layer's attention is recorded only if a
    signal reads it, and only the rows that the signals read.
    """

    def __init__(self, parts: Parts, tower: ModuleType, features: Features, signals: Sequence[str]) -> None:
        super().__init__()
        self.depth = max(features.layer_counts)
        self.tower = parts.tower
        self.family = tower
        self.features = features
        self.signals = [(SIGNALS[name], SIGNALS[name].layer(self.depth)) for name in signals]
        self.rows: dict[int, Literal["all", "first"]] = {}
        for signal, index in self.signals:
            self.rows[index] = signal.rows if self.rows.get(index, "first") == "first" else "all"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Run the tower and compute the signals."""
        hidden: Tensor
        # A tower gives each of its layers one more thing than the tokens: a mask, or features that it adds.
        hidden, given = self.family.embed(self.tower, pixel_values)
        states = [hidden]
        attention = {}
        for index, layer in enumerate(self.family.layers(self.tower)[: self.depth]):
            recorder = Recorder(rows=self.rows[index]) if index in self.rows else None
            with recording(recorder):
                hidden = layer(hidden, given)
            states.append(hidden)
            if recorder is not None:
                before, skipped = self.features.prefix_tokens, self.features.skipped_patches
                attention[index] = LayerAttention(recorder.value, before, skipped)
        chosen = [states[count][:, self.features.dropped_tokens :] for count in self.features.layer_counts]
        image_features = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
        return (image_features, *(signal.compute(attention[index]) for signal, index in self.signals))


class Pruner(nn.Module):
    """Base of the pruners before the LLM: the projector, and a method with its constants.

    If the method compares projected tokens, all tokens are projected before it chooses.
    """

    def __init__(self, parts: Parts, features: Features, pruner: VisionPruner) -> None:
        super().__init__()
        self.projector = parts.projector
        self.pruner = pruner
        self.projects_first = bool(getattr(pruner, "projected", False))
        self.features = features
        constants = pruner.constants(features.layout)
        self.constant_names = list(constants)
        for name, array in constants.items():
            self.register_buffer(f"constant_{name}", torch.tensor(array.tolist(), dtype=torch.float32))

    def method_inputs(self, signals: list[Tensor]) -> dict[str, Tensor]:
        """Return the signals and constants that the method reads, by name."""
        known = dict(zip(self.pruner.signals, signals, strict=True))
        return known | {name: self.get_buffer(f"constant_{name}") for name in self.constant_names}


class TokenPruner(Pruner):
    """The pruner of images of one tile: it selects and gathers before it projects the kept tokens only.

    vision_features [T, A + N, Dv], keep_tokens [] int64, signals [T, N] or [T, N, N] ->
    image_features [T * (A + K), D], keep_indices [T, K]
    """

    def forward(
        self, vision_features: Tensor, keep_tokens: Tensor, signals: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Prune and project."""
        layout, always_kept = self.features.layout, self.features.always_kept
        count = symbolic_size(keep_tokens, layout.visual_tokens)
        tokens = self.projector(vision_features) if self.projects_first else vision_features
        known = self.method_inputs(signals)
        indices = self.pruner.select(tokens[:, always_kept:], known, count, layout)  # [T, K]
        kept = gather_tokens(tokens, indices, always_kept)  # [T * (A + K), Dv or D]
        return (kept if self.projects_first else self.projector(kept)), indices


def symbolic_size(tensor: Tensor, most: int) -> int:
    """Return the number in a scalar, from 1 to `most`; during tracing, a symbol on which sizes may depend.

    `int(tensor)` would demand a concrete number, and make the tracer fall back to following Python's
    bytecode.
    """
    number = cast("int", tensor.item())
    torch._check(number >= 1)
    torch._check(number <= most)
    return number


class Embedding(nn.Module):
    """The embedding table, with visual tokens in place of the placeholders.

    input_ids [B, S], image_features [M, D] -> inputs_embeds [B, S, D], and is_visual [B, S] if `tell_visual`,
    and is_rater [B, S] if a method inside the LLM chooses raters.

    The first M placeholders are replaced by the visual tokens in order. A later placeholder, such as one that
    the model itself generated, counts as text, as in transformers. M may be 0: an appended row of zeros gives
    all other positions something to gather, so that no shape depends on data.

    Some checkpoints give the placeholder an id beyond the table. It is then looked up as token 0, which is
    harmless: the row is replaced, and no text can contain that id.
    """

    def __init__(
        self,
        parts: Parts,
        image_token_id: int,
        *,
        tell_visual: bool = False,
        rating: RatingPruner | None = None,
    ) -> None:
        super().__init__()
        self.embed_tokens = parts.language_model.get_input_embeddings()
        self.image_token_id = image_token_id
        self.is_beyond = image_token_id >= cast("Tensor", self.embed_tokens.weight).shape[0]
        self.tell_visual = tell_visual
        self.rating = rating

    def forward(self, input_ids: Tensor, image_features: Tensor) -> tuple[Tensor, ...]:
        """Look up the text tokens and insert the visual tokens."""
        placeholder = input_ids == self.image_token_id  # [B, S]
        text = self.embed_tokens(input_ids.masked_fill(placeholder, 0) if self.is_beyond else input_ids)
        order = placeholder.float().cumsum(dim=1).long() - 1  # TensorRT's CumSum takes floats; exact to 2**24
        is_visual = placeholder & (order < image_features.shape[0])
        order = torch.where(is_visual, order, image_features.shape[0])
        padded = torch.cat([image_features, torch.zeros(1, text.shape[-1], dtype=text.dtype)])
        visual = padded.index_select(0, order.reshape(-1)).reshape(text.shape)
        embeds = torch.where(is_visual.unsqueeze(-1), visual, text)
        told = (is_visual,) if self.tell_visual else ()
        raters = () if self.rating is None else (self.rating.raters(embeds, is_visual),)
        return (embeds, *told, *raters)


class Decoder(nn.Module):
    """The whole decoder with its head.

    inputs_embeds [B, S, D], position_ids [B, S], past -> logits [B, 1, V], present.

    The model's own `forward` runs, so whatever a family does between layers is kept. The causal mask is made
    here from S and P.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.language_model = parts.language_model
        self.lm_head = parts.lm_head

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Run a prefill (P is 0), a decoding step (S is 1), or the prompt of a later turn."""
        mask = causal_mask(inputs_embeds.shape[1], past[0].shape[2], inputs_embeds.dtype)
        cache = GraphCache(past)
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return (self.lm_head(hidden[:, -1:]), *cache.present)
