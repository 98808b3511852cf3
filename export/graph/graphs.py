"""The modules that become graphs: thin wrappers around the checkpoint's own.

Each wrapper is built twice: around weightless modules, to be traced; and around the loaded ones, as
the reference the trace is checked against and the source of its weights, which have equal names.
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
from visprune.pruning.base import VisionPruner
from visprune.pruning.select import gather_tokens
from visprune.pruning.signals import SIGNALS, LayerAttention

__all__ = ["Decoder", "Embedding", "Pruner", "TokenPruner", "VisionEncoder", "size"]


class VisionEncoder(nn.Module):
    """pixel_values [T, 3, H, W] -> image_features [T, A + N, Dv], then each signal, [T, N] or [T, N, N].

    Layers after the last one that the projector takes are not part of it. A layer's attention is
    recorded where a signal reads it, and no more of it than the signals read.
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
        """Run the tower as far as the projector's features."""
        hidden: Tensor = self.family.embed(self.tower, pixel_values)
        states = [hidden]
        attention = {}
        for index, layer in enumerate(self.family.layers(self.tower)[: self.depth]):
            recorder = Recorder(rows=self.rows[index]) if index in self.rows else None
            with recording(recorder):
                hidden = layer(hidden, None)
            states.append(hidden)
            if recorder is not None:
                before, skipped = self.features.prefix_tokens, self.features.skipped_patches
                attention[index] = LayerAttention(recorder.value, before, skipped)
        chosen = [states[count][:, self.features.dropped_tokens :] for count in self.features.layer_counts]
        image_features = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
        return (image_features, *(signal.compute(attention[index]) for signal, index in self.signals))


class Pruner(nn.Module):
    """What every pruner before the LLM has: the projector, and a method with its constants.

    A method that compares projected tokens has all of them projected first.
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

    def known(self, signals: list[Tensor]) -> dict[str, Tensor]:
        """What the method reads, by name: signals and constants."""
        known = dict(zip(self.pruner.signals, signals, strict=True))
        return known | {name: self.get_buffer(f"constant_{name}") for name in self.constant_names}


class TokenPruner(Pruner):
    """Select, gather, then project, so that dropped tokens are never projected.

    vision_features [T, A + N, Dv], keep_tokens [] int64, signals [T, N] or [T, N, N] ->
    image_features [T * (A + K), D], keep_indices [T, K]
    """

    def forward(
        self, vision_features: Tensor, keep_tokens: Tensor, signals: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Prune and project."""
        layout, always_kept = self.features.layout, self.features.always_kept
        count = size(keep_tokens, layout.visual_tokens)
        tokens = self.projector(vision_features) if self.projects_first else vision_features
        indices = self.pruner.select(tokens[:, always_kept:], self.known(signals), count, layout)  # [T, K]
        kept = gather_tokens(tokens, indices, always_kept)  # [T * (A + K), Dv or D]
        return (kept if self.projects_first else self.projector(kept)), indices


def size(tensor: Tensor, most: int) -> int:
    """The number in a scalar, 1 to `most`; while it is traced, a symbol, which sizes may depend on.

    `int(tensor)` would ask for a number, and have the tracer follow Python's bytecode instead.
    """
    number = cast("int", tensor.item())
    torch._check(number >= 1)
    torch._check(number <= most)
    return number


class Embedding(nn.Module):
    """input_ids [B, S], image_features [M, D] -> inputs_embeds [B, S, D], and is_visual [B, S] if wanted.

    The first M placeholders take the visual tokens in order. A placeholder beyond them, such as one
    that the model itself generated, is text, as in transformers. M may be 0: the row of zeros that is
    appended gives every other position something to gather, so no shape depends on data.

    Some checkpoints give the placeholder an id beyond the table. It is looked up as token 0 then: its row
    is replaced, and no text can hold it.
    """

    def __init__(self, parts: Parts, image_token_id: int, *, tell_visual: bool = False) -> None:
        super().__init__()
        self.embed_tokens = parts.language_model.get_input_embeddings()
        self.image_token_id = image_token_id
        self.is_beyond = image_token_id >= cast("Tensor", self.embed_tokens.weight).shape[0]
        self.tell_visual = tell_visual

    def forward(self, input_ids: Tensor, image_features: Tensor) -> tuple[Tensor, ...]:
        """Look up text, put visual tokens in place."""
        placeholder = input_ids == self.image_token_id  # [B, S]
        text = self.embed_tokens(input_ids.masked_fill(placeholder, 0) if self.is_beyond else input_ids)
        order = placeholder.float().cumsum(dim=1).long() - 1  # TensorRT has CumSum for floats; exact to 2**24
        is_visual = placeholder & (order < image_features.shape[0])
        order = torch.where(is_visual, order, image_features.shape[0])
        padded = torch.cat([image_features, torch.zeros(1, text.shape[-1], dtype=text.dtype)])
        visual = padded.index_select(0, order.reshape(-1)).reshape(text.shape)
        embeds = torch.where(is_visual.unsqueeze(-1), visual, text)
        return (embeds, is_visual) if self.tell_visual else (embeds,)


class Decoder(nn.Module):
    """inputs_embeds [B, S, D], position_ids [B, S], past -> logits [B, 1, V], present.

    The model's own forward runs, so whatever a family does between layers is kept. The causal mask
    is made here from S and P.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.language_model = parts.language_model
        self.lm_head = parts.lm_head

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Prefill when P is 0, decode when S is 1; anything between is a later turn."""
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
