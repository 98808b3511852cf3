"""The modules that are traced into graphs: thin wrappers around the checkpoint's own modules.

Each wrapper is built twice. Built of weightless modules, it is traced. Built of the checkpoint's modules, it
is the source of the graph's weights, which have the same names, and the reference of the self-check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from visprune.errors import UnsupportedError
from visprune.export.graph.attention import Recorder, recording
from visprune.export.graph.layers import GraphCache, causal_mask
from visprune.export.models.parts import Features, Parts
from visprune.pruning.base import Merged, RatingPruner, Traits, VisionPruner
from visprune.pruning.select import gather_tokens
from visprune.pruning.signals import SIGNALS, LayerAttention, Signal

__all__ = ["Decoder", "Embedding", "Pruner", "TokenPruner", "VisionEncoder", "symbolic_size"]


class VisionEncoder(nn.Module):
    """The vision tower as far as the projector's features, with the signals that a pruning method reads.

    pixel_values [T, 3, H, W] -> image_features [T, A + N, Dv], then each signal, [T, N] or [T, N, N].

    Layers after the last one that the projector takes are left out. A layer's attention is recorded only if a
    signal reads it, and only the rows that the signals read. If `resizes`, images have any size.
    """

    def __init__(
        self,
        parts: Parts,
        tower: ModuleType,
        features: Features,
        signals: Sequence[str],
        *,
        resizes: bool = False,
    ) -> None:
        super().__init__()
        self.depth = max(features.layer_counts)
        self.tower = parts.tower
        self.family = tower
        self.embed = tower.embed_resized if resizes else tower.embed
        self.features = features
        self.signals = {name: SIGNALS[name] for name in signals}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Run the tower and compute the signals."""
        hidden: Tensor
        # A tower gives each of its layers one more thing than the tokens: a mask, or features that it adds.
        hidden, given = self.embed(self.tower, pixel_values)
        states = [hidden]
        computed: dict[str, list[Tensor]] = {name: [] for name in self.signals}
        for index, layer in enumerate(self.family.layers(self.tower)[: self.depth]):
            wanted = self._read_from(index)
            recorder = Recorder(rows=_rows(wanted)) if wanted else None
            with recording(recorder):
                hidden = layer(hidden, given)
            states.append(hidden)
            if recorder is not None:
                logits = None if recorder.rows is None else recorder.value
                record = self._record(logits=logits, keys=recorder.key)
                for name, signal in wanted.items():
                    computed[name].append(signal.compute(record))
        chosen = [states[count] for count in self.features.layer_counts]
        encoded = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
        signals = []
        for name, signal in self.signals.items():
            if signal.reads == "cls_feature":
                signals.append(signal.compute(self._record(cls_feature=encoded[:, 0])))
            elif signal.combine is None:
                signals.append(computed[name][0])
            else:
                signals.append(signal.combine(torch.stack(computed[name])))
        return (encoded[:, self.features.dropped_tokens :], *signals)

    def _read_from(self, index: int) -> dict[str, Signal]:
        """Return the signals that read the attention or the keys of a layer."""
        return {
            name: signal
            for name, signal in self.signals.items()
            if signal.reads != "cls_feature" and index in signal.layers(self.depth)
        }

    def _record(
        self, logits: Tensor | None = None, keys: Tensor | None = None, cls_feature: Tensor | None = None
    ) -> LayerAttention:
        features = self.features
        return LayerAttention(logits, features.prefix_tokens, features.skipped_patches, keys, cls_feature)


def _rows(signals: Mapping[str, Signal]) -> Literal["all", "first"] | None:
    """Return the queries whose attention some signals of one layer read."""
    reads = {signal.reads for signal in signals.values()}
    return "all" if "all" in reads else "first" if "first" in reads else None


class Pruner(nn.Module):
    """Base of the pruners before the LLM: the projector, and a method with its constants.

    If the method compares projected tokens, all tokens are projected before it chooses. If it needs the
    question, the embeddings of the question's tokens are an input, question_embeds [B, Q, D]. If it merges
    tokens, the last output is merge_weights [T, K, N] float32.
    """

    def __init__(self, parts: Parts, features: Features, pruner: VisionPruner) -> None:
        super().__init__()
        self.projector = parts.projector
        self.pruner = pruner
        self.traits = Traits.of(pruner)
        self.features = features
        constants = pruner.constants(features.layout)
        self.constant_names = list(constants)
        for name, array in constants.items():
            self.register_buffer(f"constant_{name}", torch.tensor(array.tolist(), dtype=torch.float32))

    def checked(self, selected: Tensor | Merged) -> Tensor | Merged:
        """Return what a method selected.

        Raises:
            UnsupportedError: It is not of the kind that the method's class says.
        """
        if isinstance(selected, Merged) != self.traits.merges:
            kind = "indices" if self.traits.merges else "`Merged`"
            raise UnsupportedError(
                f"`select` of {type(self.pruner).__name__} returns {kind}, and its class has "
                f"merges = {self.traits.merges}.",
                "Return what `visprune.pruning.base` asks for.",
            )
        return selected

    def method_inputs(self, question: list[Tensor], signals: list[Tensor]) -> dict[str, Tensor]:
        """Return the signals, the question and the constants that the method reads, by name."""
        known = dict(zip(self.pruner.signals, signals, strict=True))
        if question:
            known["question_embeds"] = question[0][0].float()
        return known | {name: self.get_buffer(f"constant_{name}") for name in self.constant_names}


class TokenPruner(Pruner):
    """The pruner of images of one tile: it selects and gathers before it projects the kept tokens only.

    vision_features [T, A + N, Dv], keep_tokens [] int64, the question, signals [T, ...] ->
    image_features [T * (A + K), D], keep_indices [T, K]
    """

    def forward(
        self, vision_features: Tensor, keep_tokens: Tensor, question: list[Tensor], signals: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Prune and project."""
        layout, always_kept = self.features.layout, self.features.always_kept
        count = symbolic_size(keep_tokens, layout.visual_tokens)
        tokens = self.projector(vision_features) if self.traits.projected else vision_features
        known = self.method_inputs(question, signals)
        selected = self.checked(self.pruner.select(tokens[:, always_kept:], known, count, layout))
        found: tuple[Tensor, ...]
        if isinstance(selected, Merged):
            made = torch.cat([tokens[:, :always_kept], selected.tokens.to(tokens.dtype)], dim=1)
            kept, found = made.flatten(0, 1), (selected.indices, selected.weights)
        else:
            kept, found = gather_tokens(tokens, selected, always_kept), (selected,)
        return (kept if self.traits.projected else self.projector(kept)), *found  # [T * (A + K), D], [T, K]


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
