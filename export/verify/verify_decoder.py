"""The self-check of the decoder, whole or in segments.

Two sequences go through the graphs: a prompt from which nothing is pruned, against transformers' own forward;
and a pruned one with some greedy tokens after it, against PyTorch with the same tokens pruned. Decoding is
fed PyTorch's tokens, and what is left after a prune point is PyTorch's choice, once the graph's own was
compared with it: so one near tie does not hide what follows it, and a graph is opened only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from visprune.export.graph import attention
from visprune.export.graph.graph_specs import Cuts
from visprune.export.graph.program import GATHERED
from visprune.export.graph.segments import Segment, SegmentPruner, attention_layers, cuts_of, spans
from visprune.export.models.parts import Parts, cache_shape
from visprune.export.verify.compare import Arrays, Check, Graphs
from visprune.manifest import LayerPruning, Manifest
from visprune.pruning.base import LayerPruner

__all__ = ["Flow", "Reference", "compare_decoder", "compare_pruner", "refer"]

NEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Reference:
    """What PyTorch computes, kept after its weights are gone.

    Attributes:
        unpruned: Logits after the prompt with every visual token, [1, 1, V].
        logits: [NEW_TOKENS, V], after the pruned prompt and after each greedy token.
        embeds: [1, 1, D] each, the input embeddings of these tokens but the last.
        scores: Of the tokens that come to each prune point, [1, S].
        kept: The indices of those left after it, [1, S'].
    """

    unpruned: Tensor
    logits: Tensor
    embeds: list[Tensor]
    scores: list[Tensor]
    kept: list[Tensor]


@dataclass(slots=True)
class Flow:
    """One step of a sequence on its way through the graphs."""

    hidden: NDArray[Any]
    position_ids: NDArray[np.int64]
    is_visual: NDArray[np.bool_]


def refer(
    parts: Parts, embeds: Tensor, is_visual: Tensor, manifest: Manifest, cuts: Cuts, unpruned: Tensor
) -> Reference:
    """Greedy tokens after a prompt, by transformers' decoder; by our segments of it where those are pruned.

    Args:
        parts: In float32.
        embeds: [1, S, D] of the prompt.
        is_visual: [1, S] bool.
        manifest: Says how many tokens are kept at each prune point.
        cuts: Where, and by what method.
        unpruned: Passed on.
    """
    table, head = parts.language_model.get_input_embeddings(), parts.lm_head
    logits: list[Tensor] = []
    inputs = [embeds]
    pruner, inside = cuts.pruner, manifest.layer_pruning
    chain = None if pruner is None or inside is None else _Chain(parts, is_visual, inside, pruner)
    cache = DynamicCache()
    for _ in range(NEW_TOKENS):
        if chain is None:
            out = parts.language_model(inputs_embeds=inputs[-1], past_key_values=cache, use_cache=True)
            logits.append(head(out.last_hidden_state[:, -1:]))
        else:
            logits.append(chain(inputs[-1]))
        inputs.append(table(logits[-1].argmax(dim=-1)))
    scores, kept = ([], []) if chain is None else (chain.scores, chain.kept)
    return Reference(unpruned, torch.cat(logits, dim=1)[0], inputs[1:-1], scores, kept)


class _Chain:
    """The segments in PyTorch, with their caches; the first call is the prompt."""

    def __init__(self, parts: Parts, is_visual: Tensor, inside: LayerPruning, pruner: LayerPruner) -> None:
        attention.register()
        parts.language_model.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
        config = parts.language_model.config
        found = spans(config.num_hidden_layers, cuts_of(pruner, inside.layers))
        self.segments = [Segment(parts, span, None if span is found[-1] else pruner).eval() for span in found]
        heads, head_dim = cache_shape(config)
        empty = torch.zeros(1, heads, 0, head_dim)
        self.caches = [[empty] * (2 * len(attention_layers(span))) for span in found]
        self.is_visual = is_visual
        entering = int(is_visual.sum())
        self.left = [is_visual.shape[1] - entering + n for n in inside.budget.kept(entering)]
        self.renumbers = pruner.positions == "renumbered"
        self.length = 0
        self.scores: list[Tensor] = []
        self.kept: list[Tensor] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        """[1, S, D] -> logits [1, 1, V]."""
        prompt = self.length == 0
        positions = torch.arange(self.length, self.length + hidden.shape[1])[None]
        visual = self.is_visual if prompt else torch.zeros(1, 1, dtype=torch.bool)
        self.length += hidden.shape[1]
        for index, segment in enumerate(self.segments):
            past = self.caches[index]
            if self.renumbers:
                before = past[0].shape[2]
                positions = torch.arange(before, before + hidden.shape[1])[None]
            is_last = index == len(self.segments) - 1
            hidden, *rest = segment(hidden, positions, past, None if is_last else visual)
            self.caches[index] = rest if is_last else rest[1:]
            if prompt and not is_last:
                prune = SegmentPruner()
                self.scores.append(rest[0])
                hidden, positions, visual, kept = prune(
                    hidden, positions, visual, rest[0], torch.tensor(self.left[index])
                )
                self.kept.append(kept)
        return hidden


def compare_decoder(
    check: Check, run: Graphs, prompts: Sequence[tuple[NDArray[Any], NDArray[np.bool_]]], reference: Reference
) -> None:
    """Put the pruned prompt and the whole one, each embedded and with `is_visual`, through the decoder.

    Raises:
        ParityError: A difference is larger than the tolerance.
    """
    manifest = run.bundle.manifest
    tokens = [embed.numpy() for embed in reference.embeds]
    pruned, whole = (
        _sequence(embeds, visual, later)
        for (embeds, visual), later in zip(prompts, (tokens, []), strict=True)
    )
    for stage in manifest.stages:
        if stage.graph == "segment_pruner":
            point = _number(stage.inputs["keep_tokens"])
            compare_pruner(check, run, pruned, reference.scores[point], reference.kept[point], point)
        elif stage.graph.startswith("decoder"):
            scores = _through(run, stage.graph, [pruned, whole])
            if "token_scores" in stage.outputs:
                point = _number(stage.outputs["token_scores"])
                visual = torch.from_numpy(pruned[0].is_visual)
                want = reference.scores[point][visual]
                check.close(f"{stage.graph} token_scores", scores[visual.numpy()], want)
    note = "against transformers"
    check.close("prefill logits, nothing pruned", whole[0].hidden, reference.unpruned, note)
    check.close("prefill logits, pruned", pruned[0].hidden[0], reference.logits[:1])
    wrong, worst, tolerance = 0, 0.0, check.tolerance
    for step, want in zip(pruned, reference.logits.numpy(), strict=True):
        got = step.hidden.astype(np.float32)[0, -1]
        scale = float(np.abs(want).max()) or 1.0
        worst = max(worst, float(np.abs(got - want).max()) / scale)
        # A tie is no difference: the other token must be worse by more than rounding.
        wrong += float(want.max() - want[int(got.argmax())]) / scale > 2 * tolerance
    check.add("decode logits", worst, tolerance, f"{NEW_TOKENS - 1} cached steps")
    check.add("greedy tokens", float(wrong), 0.0, f"{NEW_TOKENS - wrong} of {NEW_TOKENS} equal")


def _number(value: str) -> int:
    """The prune point that a value's name ends in."""
    return int(value.rpartition(".")[2])


def _sequence(embeds: NDArray[Any], visual: NDArray[np.bool_], later: list[NDArray[Any]]) -> list[Flow]:
    """A prompt and the tokens that follow it."""
    length = embeds.shape[1]
    steps = [Flow(embeds, np.arange(length)[None], visual)]
    one = np.zeros((1, 1), dtype=bool)
    return steps + [Flow(token, np.array([[length + i]]), one) for i, token in enumerate(later)]


def _through(run: Graphs, graph: str, sequences: list[list[Flow]]) -> NDArray[Any]:
    """Put every step of the sequences through one graph; give the first prompt's scores, if any."""
    manifest = run.bundle.manifest
    facts = manifest.decoder
    empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_dim), facts.cache_dtype)
    names = [spec.name for spec in manifest.graphs[graph].inputs]
    scores: list[NDArray[Any]] = []
    with run.opened(graph) as infer:
        for steps in sequences:
            cache: Arrays = {}
            for step in steps:
                feeds: Arrays = dict.fromkeys(("inputs_embeds", "hidden_states"), step.hidden)
                feeds |= {"position_ids": step.position_ids, "is_visual": step.is_visual}
                feeds |= {n: cache.get(n, empty) for n in names if n.startswith("past_key_values")}
                out = infer(feeds)
                for name, value in out.items():
                    if name.startswith("present"):
                        cache[name.replace("present", "past_key_values")] = value
                step.hidden = out["last_hidden_state"] if "last_hidden_state" in out else out["logits"]
                scores += [out["token_scores"]] if "token_scores" in out else []
    return scores[0] if scores else np.empty(0)


def compare_pruner(
    check: Check, run: Graphs, steps: list[Flow], scores: Tensor, wanted: Tensor, point: int
) -> None:
    """The graph's choice among the reference's scores, exactly; then the steps go on with the reference's.

    Args:
        check: Where the comparison goes.
        run: The bundle's graphs.
        steps: A prompt and what follows it, as they come to the prune point.
        scores: The reference's, of the tokens of the prompt, [1, S].
        wanted: Indices of those left by the reference, [1, S'].
        point: Number of the prune point.
    """
    prompt, kept = steps[0], wanted.numpy()
    feeds = {
        "hidden_states": prompt.hidden,
        "position_ids": prompt.position_ids,
        "is_visual": prompt.is_visual,
        "token_scores": scores.numpy(),
        "keep_tokens": np.array(kept.shape[1]),
    }
    (out,) = run.run("segment_pruner", [feeds])
    check.kept(f"prune point {point} keep_indices", list(out["keep_indices"]), list(wanted.numpy()), 0.0)
    chosen = out["keep_indices"][0]
    wrong = sum(not np.array_equal(out[f"kept_{name}"], feeds[name][:, chosen]) for name in GATHERED)
    check.add(f"prune point {point} gathered", float(wrong), 0.0, "what goes on")
    prompt.hidden = prompt.hidden[:, kept[0]]
    prompt.position_ids = prompt.position_ids[:, kept[0]]
    prompt.is_visual = prompt.is_visual[:, kept[0]]
    inside = run.bundle.manifest.layer_pruning
    if inside is not None and inside.positions == "renumbered":
        for index, step in enumerate(steps):
            start = kept.shape[1] + index - 1 if index else 0
            step.position_ids = np.arange(start, start + step.hidden.shape[1])[None]
