"""The self-check, layer by layer, of a decoder that does not fit into memory.

Each layer is taken out of the written graph, and runs on a short prompt and one cached step after it. Its
output is compared with that of the checkpoint's own layer in float32, whose weights are in memory only
meanwhile; PyTorch's output is the input of the next layer. Layers are thus compared one by one, but greedy
tokens of the whole decoder are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visprune.export.checkpoint.weights import Weights
from visprune.export.graph import attention
from visprune.export.graph.graph_specs import Cuts
from visprune.export.graph.layers import GraphCache, attend, causal_mask, feed_forward
from visprune.export.graph.segments import Segment, SegmentPruner, spans
from visprune.export.models.parts import Parts, cache_shape
from visprune.export.verify.compare import Arrays, Check, GraphRunner, relative_difference, trim_heap
from visprune.export.verify.pieces import DecoderGraph, Piece
from visprune.export.verify.verify_decoder import Step, compare_pruner, find_raters
from visprune.pruning.base import LayerPruner

__all__ = ["compare_layers"]

LENGTH = 64
"""Tokens of the prompt: enough to have text and visual tokens, and quick to compute."""


def compare_layers(
    check: Check,
    runner: GraphRunner,
    parts: Parts,
    weights: Weights,
    cuts: Cuts,
    prompt: tuple[Tensor, Tensor],
) -> None:
    """Compare every layer of the decoder, and the norm with the head after the last one.

    Args:
        check: Collects the comparisons.
        runner: Runs the bundle's graphs.
        parts: Modules of the checkpoint, with their parameters on the meta device.
        weights: The values of these parameters.
        cuts: How the decoder is cut.
        prompt: Input embeddings [1, S, D], and which of them are visual [1, S].

    Raises:
        ParityError: A difference is larger than the tolerance.
        ExportError: The layers of a graph cannot be told apart.
    """
    manifest = runner.bundle.manifest
    inside = manifest.layer_pruning
    embeds, is_visual = (part[:, : min(LENGTH, manifest.decoder.context_limit - 1)] for part in prompt)
    steps = _steps(embeds, is_visual, find_raters(cuts, embeds, is_visual), manifest.dtype)
    visual = int(steps[0].is_visual.sum())
    left = [steps[0].is_visual.size - visual + n for n in inside.budget.kept(visual)] if inside else []
    names = [stage.graph for stage in manifest.stages if stage.graph.startswith("decoder")]
    found = spans(manifest.decoder.num_layers, cuts.places)
    for point, (name, span) in enumerate(zip(names, found, strict=True)):
        graph = DecoderGraph(runner.bundle, name, span)
        pruner = cuts.pruner if point < len(left) else None
        for piece in graph.pieces:
            last = piece is graph.pieces[-1]
            want = _reference(parts, weights, piece, steps, pruner if last else None)
            trim_heap()
            got = _run(graph, piece, steps, want[0].values[1:])
            worst = max(
                relative_difference(mine[str(value.name)], tensor)
                for mine, theirs in zip(got, want, strict=True)
                for value, tensor in zip(piece.outputs, theirs.values, strict=False)
            )
            check.add(piece.name, worst, check.tolerance, "a prompt and a cached step")
            for step, theirs in zip(steps, want, strict=True):
                step.hidden = theirs.values[0].numpy().astype(manifest.dtype)
        if pruner is None:
            continue
        scores, marked = want[0].scores, torch.from_numpy(steps[0].is_visual)
        check.close(f"{name} token_scores", got[0]["token_scores"][steps[0].is_visual], scores[marked])
        hidden, positions = torch.from_numpy(steps[0].hidden), torch.from_numpy(steps[0].position_ids)
        *_, kept = SegmentPruner()(hidden, positions, marked, scores, torch.tensor(left[point]))
        compare_pruner(check, runner, steps, scores, kept, point)


@dataclass(frozen=True, slots=True)
class _PieceReference:
    """PyTorch's outputs of a piece in one step: values in the order of `Piece.outputs`, and scores."""

    values: list[Tensor]
    scores: Tensor


def _steps(embeds: Tensor, is_visual: Tensor, is_rater: Tensor, dtype: str) -> list[Step]:
    """Return two steps: the tokens of a prompt, and its first token again as the cached step."""
    hidden, length = embeds.numpy().astype(dtype), embeds.shape[1]
    prompt = Step(hidden, np.arange(length)[None], is_visual.numpy(), is_rater.numpy())
    one = np.zeros((1, 1), dtype=bool)
    return [prompt, Step(hidden[:, :1], np.array([[length]]), one, one)]


def _reference(
    parts: Parts, weights: Weights, piece: Piece, steps: Sequence[Step], scored: LayerPruner | None
) -> list[_PieceReference]:
    """Run a piece in PyTorch, with its weights in memory only meanwhile.

    Args:
        parts: Modules of the checkpoint, with their parameters on the meta device.
        weights: The values of these parameters.
        piece: The piece to run.
        steps: A prompt, and the cached step after it.
        scored: The method whose scores are computed at the end of the piece, if any.
    """
    model: Any = parts.language_model
    first = piece.span.start // 2
    # Scores at the end of a layer come from the attention of the next layer.
    needed = model.layers[first : first + 2] if scored else model.layers[first : first + 1]
    # Only our own attention function can record scores; otherwise transformers' own is the reference.
    model.set_attn_implementation(attention.IMPLEMENTATION["primitive"] if scored else "eager")
    heads, head_dim = cache_shape(model.config)
    past = [torch.zeros(1, heads, 0, head_dim)] * 2
    wanted = []
    with weights.loaded(nn.ModuleList(needed if piece.span else [model.norm, parts.lm_head]), torch.float32):
        for step in steps:
            hidden, positions = torch.from_numpy(step.hidden).float(), torch.from_numpy(step.position_ids)
            scores = torch.empty(0)
            if not piece.span:
                values = [parts.lm_head(model.norm(hidden[:, -1:]))]
            elif scored is None:
                values = _layer(model, piece.span, hidden, positions, past)
            else:
                segment = Segment(parts, piece.span, scored)
                marks = torch.from_numpy(step.is_visual), torch.from_numpy(step.is_rater)
                out, scores, *present = segment(hidden, positions, past, *marks)
                values = [out, *present]
            past = values[1:] or past
            wanted.append(_PieceReference(values, scores))
    return wanted


def _layer(model: Any, span: range, hidden: Tensor, positions: Tensor, past: list[Tensor]) -> list[Tensor]:
    """Run a layer or half a layer by the checkpoint's own modules.

    Returns:
        The residual stream, and the present key and value if the attention block was run.
    """
    layer = model.layers[span.start // 2]
    cache = GraphCache(past, span.start // 2)
    mask = causal_mask(hidden.shape[1], past[0].shape[2], hidden.dtype)
    rotary = model.rotary_emb(hidden, positions)
    if len(span) == 2:
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            position_embeddings=rotary,
        )
    elif span.start % 2:
        hidden = feed_forward(layer, hidden)
    else:
        hidden = attend(layer, hidden, rotary, mask, cache)
    return [hidden, *cache.present]


def _run(graph: DecoderGraph, piece: Piece, steps: Sequence[Step], present: list[Tensor]) -> list[Arrays]:
    """Run a piece of the graph on the same steps; the second step gets PyTorch's cache of the first."""
    pasts = [tensor[:, :, :0].numpy() for tensor in present], [tensor.numpy() for tensor in present]
    got = []
    with graph.opened(piece) as infer:
        for step, past in zip(steps, pasts, strict=True):
            stream = ("inputs_embeds", "hidden_states", str(piece.start.name))
            feeds: Arrays = dict.fromkeys(stream, step.hidden)
            feeds |= {"position_ids": step.position_ids}
            feeds |= {"is_visual": step.is_visual, "is_rater": step.is_rater}
            # A piece reads only the length of the caches of other layers.
            feeds |= {name: past[name.endswith("value")] for name in graph.past if past}
            got.append(infer(feeds))
    return got
