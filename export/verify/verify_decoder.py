"""The self-check of the decoder as a whole or in segments.

Two sequences run through the graphs. A prompt from which nothing is pruned is compared with transformers' own
`forward`. A pruned prompt with some greedy tokens after it is compared with PyTorch, where the same tokens
are pruned. Both sides decode PyTorch's tokens, and after a prune point both go on with the tokens that
PyTorch kept, once the graph's choice was compared with PyTorch's. So one near tie does not hide later errors,
and each graph is opened only once.
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
from visprune.export.verify.compare import Arrays, Check, GraphRunner, relative_difference
from visprune.manifest import LayerPruning, Manifest
from visprune.pruning.base import LayerPruner

__all__ = ["Reference", "Step", "compare_decoder", "compare_pruner", "compute_reference", "find_raters"]

NEW_TOKENS = 8
"""Greedy tokens that are compared."""


@dataclass(frozen=True, slots=True)
class Reference:
    """PyTorch's results, which remain after its weights were released.

    Attributes:
        unpruned: Logits after the prompt with all visual tokens, [1, 1, V].
        logits: Logits after the pruned prompt and after each greedy token, [NEW_TOKENS, V].
        embeds: Input embeddings of the greedy tokens except the last, [1, 1, D] each.
        is_rater: Which tokens of the pruned prompt rate, [1, S].
        scores: Scores of the tokens that reach each prune point, [1, S] each.
        kept: Indices of the tokens that remain after each prune point, [1, S'] each.
    """

    unpruned: Tensor
    logits: Tensor
    embeds: list[Tensor]
    is_rater: Tensor
    scores: list[Tensor]
    kept: list[Tensor]


@dataclass(slots=True)
class Step:
    """One prefill or decoding step of a sequence, as it is between two graphs.

    Attributes:
        hidden: Residual stream [1, S, D]; after the last graph, logits [1, 1, V].
        position_ids: [1, S].
        is_visual: Which tokens are visual, [1, S].
        is_rater: Which tokens rate, [1, S]; it counts only in a prompt whose scores are compared.
    """

    hidden: NDArray[Any]
    position_ids: NDArray[np.int64]
    is_visual: NDArray[np.bool_]
    is_rater: NDArray[np.bool_]


def find_raters(cuts: Cuts, embeds: Tensor, is_visual: Tensor) -> Tensor:
    """Return which tokens of a prompt rate, [1, S] bool: none if the method has no raters."""
    return torch.zeros_like(is_visual) if cuts.rating is None else cuts.rating.raters(embeds, is_visual)


def compute_reference(
    parts: Parts, embeds: Tensor, is_visual: Tensor, manifest: Manifest, cuts: Cuts, unpruned: Tensor
) -> Reference:
    """Decode greedily in PyTorch after a prompt.

    Transformers' decoder computes the tokens if nothing is pruned inside it, and otherwise the modules of the
    segments do.

    Args:
        parts: The model's modules in float32.
        embeds: Input embeddings of the prompt, [1, S, D].
        is_visual: Which of them are visual, [1, S] bool.
        manifest: Tells how many tokens are kept at each prune point.
        cuts: How the decoder is cut, and the method that prunes there.
        unpruned: Logits after the unpruned prompt, for the result.
    """
    table, head = parts.language_model.get_input_embeddings(), parts.lm_head
    logits: list[Tensor] = []
    inputs = [embeds]
    pruner, inside = cuts.pruner, manifest.layer_pruning
    is_rater = find_raters(cuts, embeds, is_visual)
    marks = (is_visual, is_rater)
    chain = None if pruner is None or inside is None else _SegmentChain(parts, marks, inside, pruner)
    cache = DynamicCache()
    for _ in range(NEW_TOKENS):
        if chain is None:
            out = parts.language_model(inputs_embeds=inputs[-1], past_key_values=cache, use_cache=True)
            logits.append(head(out.last_hidden_state[:, -1:]))
        else:
            logits.append(chain(inputs[-1]))
        inputs.append(table(logits[-1].argmax(dim=-1)))
    scores, kept = ([], []) if chain is None else (chain.scores, chain.kept)
    return Reference(unpruned, torch.cat(logits, dim=1)[0], inputs[1:-1], is_rater, scores, kept)


class _SegmentChain:
    """The segments of the decoder in PyTorch, with their caches. The first call takes the prompt."""

    def __init__(
        self, parts: Parts, marks: tuple[Tensor, Tensor], inside: LayerPruning, pruner: LayerPruner
    ) -> None:
        attention.register()
        parts.language_model.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
        config = parts.language_model.config
        found = spans(config.num_hidden_layers, cuts_of(pruner, inside.layers))
        self.segments = [Segment(parts, span, None if span is found[-1] else pruner).eval() for span in found]
        heads, head_dim = cache_shape(config)
        empty = torch.zeros(1, heads, 0, head_dim)
        self.caches = [[empty] * (2 * len(attention_layers(span))) for span in found]
        self.marks = marks  # of the prompt: which tokens are visual, and which rate
        is_visual = marks[0]
        entering = int(is_visual.sum())
        self.left = [is_visual.shape[1] - entering + n for n in inside.budget.kept(entering)]
        self.renumbers = pruner.positions == "renumbered"
        self.length = 0
        self.scores: list[Tensor] = []
        self.kept: list[Tensor] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run all segments on the next tokens, and prune between them if these are the prompt.

        hidden [1, S, D] -> logits [1, 1, V].
        """
        prompt = self.length == 0
        positions = torch.arange(self.length, self.length + hidden.shape[1])[None]
        visual, rater = self.marks if prompt else [torch.zeros(1, 1, dtype=torch.bool)] * 2
        self.length += hidden.shape[1]
        for index, segment in enumerate(self.segments):
            past = self.caches[index]
            if self.renumbers:
                before = past[0].shape[2]
                positions = torch.arange(before, before + hidden.shape[1])[None]
            is_last = index == len(self.segments) - 1
            hidden, *rest = segment(hidden, positions, past, visual, rater)
            self.caches[index] = rest if is_last else rest[1:]
            if prompt and not is_last:
                prune = SegmentPruner()
                self.scores.append(rest[0])
                hidden, positions, visual, rater, kept = prune(
                    hidden, positions, visual, rest[0], torch.tensor(self.left[index]), rater
                )
                self.kept.append(kept)
        return hidden


def compare_decoder(
    check: Check,
    runner: GraphRunner,
    prompts: Sequence[tuple[NDArray[Any], NDArray[np.bool_]]],
    reference: Reference,
) -> None:
    """Run a pruned and an unpruned prompt through the decoder and compare the results with PyTorch's.

    Args:
        check: Collects the comparisons.
        runner: Runs the bundle's graphs.
        prompts: Input embeddings [1, S, D] and `is_visual` [1, S] of the pruned prompt and of the unpruned
            one.
        reference: PyTorch's results.

    Raises:
        ParityError: A difference is larger than the tolerance.
    """
    manifest = runner.bundle.manifest
    tokens = [embed.numpy() for embed in reference.embeds]
    pruned, whole = (
        _sequence(embeds, visual, later)
        for (embeds, visual), later in zip(prompts, (tokens, []), strict=True)
    )
    pruned[0].is_rater = reference.is_rater.numpy()
    for stage in manifest.stages:
        if stage.graph == "segment_pruner":
            point = _prune_point(stage.inputs["keep_tokens"])
            compare_pruner(check, runner, pruned, reference.scores[point], reference.kept[point], point)
        elif stage.graph.startswith("decoder"):
            scores = _run_graph(runner, stage.graph, [pruned, whole])
            if "token_scores" in stage.outputs:
                point = _prune_point(stage.outputs["token_scores"])
                visual = torch.from_numpy(pruned[0].is_visual)
                want = reference.scores[point][visual]
                check.close(f"{stage.graph} token_scores", scores[visual.numpy()], want)
    note = "against transformers"
    check.close("prefill logits, nothing pruned", whole[0].hidden, reference.unpruned, note)
    check.close("prefill logits, pruned", pruned[0].hidden[0], reference.logits[:1])
    wrong, worst, tolerance = 0, 0.0, check.tolerance
    for step, want in zip(pruned, reference.logits, strict=True):
        got = step.hidden.astype(np.float32)[0, -1]
        worst = max(worst, relative_difference(got, want))
        # Another token counts as wrong only if PyTorch's logit of it is lower by more than rounding explains.
        scale = float(want.abs().max()) or 1.0
        wrong += float(want.max() - want[int(got.argmax())]) / scale > 2 * tolerance
    check.add("decode logits", worst, tolerance, f"{NEW_TOKENS - 1} cached steps")
    check.add("greedy tokens", float(wrong), 0.0, f"{NEW_TOKENS - wrong} of {NEW_TOKENS} equal")


def _prune_point(value: str) -> int:
    """Return the number of the prune point, with which the value's name ends."""
    return int(value.rpartition(".")[2])


def _sequence(embeds: NDArray[Any], visual: NDArray[np.bool_], later: list[NDArray[Any]]) -> list[Step]:
    """Return the steps of a prompt and of the tokens after it."""
    length = embeds.shape[1]
    steps = [Step(embeds, np.arange(length)[None], visual, np.zeros_like(visual))]
    one = np.zeros((1, 1), dtype=bool)
    return steps + [Step(token, np.array([[length + i]]), one, one) for i, token in enumerate(later)]


def _run_graph(runner: GraphRunner, graph: str, sequences: list[list[Step]]) -> NDArray[Any]:
    """Run all steps of the sequences through one graph, in place.

    Returns:
        The scores [1, S] of the first prompt; an empty array if the graph computes none.
    """
    manifest = runner.bundle.manifest
    facts = manifest.decoder
    empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_dim), facts.cache_dtype)
    names = [spec.name for spec in manifest.graphs[graph].inputs]
    scores: list[NDArray[Any]] = []
    with runner.opened(graph) as infer:
        for steps in sequences:
            cache: Arrays = {}
            for step in steps:
                feeds: Arrays = dict.fromkeys(("inputs_embeds", "hidden_states"), step.hidden)
                feeds |= {"position_ids": step.position_ids}
                feeds |= {"is_visual": step.is_visual, "is_rater": step.is_rater}
                feeds |= {n: cache.get(n, empty) for n in names if n.startswith("past_key_values")}
                out = infer(feeds)
                for name, value in out.items():
                    if name.startswith("present"):
                        cache[name.replace("present", "past_key_values")] = value
                step.hidden = out["last_hidden_state"] if "last_hidden_state" in out else out["logits"]
                scores += [out["token_scores"]] if "token_scores" in out else []
    return scores[0] if scores else np.empty(0)


def compare_pruner(
    check: Check, runner: GraphRunner, steps: list[Step], scores: Tensor, wanted: Tensor, point: int
) -> None:
    """Run the segment pruner on the reference's scores; its choice must be exactly the reference's.

    Then the steps are pruned, in place, as the reference was.

    Args:
        check: Collects the comparisons.
        runner: Runs the bundle's graphs.
        steps: A prompt and the steps after it, as they reach the prune point.
        scores: The reference's scores of the prompt's tokens, [1, S].
        wanted: Indices of the tokens that the reference kept, [1, S'].
        point: Number of the prune point.

    Raises:
        ParityError: The graph's choice, or a value that it gathers, differs.
    """
    prompt, kept = steps[0], wanted.numpy()
    feeds = {
        "hidden_states": prompt.hidden,
        "position_ids": prompt.position_ids,
        "is_visual": prompt.is_visual,
        "is_rater": prompt.is_rater,
        "token_scores": scores.numpy(),
        "keep_tokens": np.array(kept.shape[1]),
    }
    (out,) = runner.run("segment_pruner", [feeds])
    check.kept(f"prune point {point} keep_indices", list(out["keep_indices"]), list(wanted.numpy()), 0.0)
    chosen = out["keep_indices"][0]
    passed = [name for name in GATHERED if f"kept_{name}" in out]
    wrong = sum(not np.array_equal(out[f"kept_{name}"], feeds[name][:, chosen]) for name in passed)
    check.add(f"prune point {point} gathered", float(wrong), 0.0, "values of the kept tokens")
    prompt.hidden = prompt.hidden[:, kept[0]]
    prompt.position_ids = prompt.position_ids[:, kept[0]]
    prompt.is_visual = prompt.is_visual[:, kept[0]]
    prompt.is_rater = prompt.is_rater[:, kept[0]]
    inside = runner.bundle.manifest.layer_pruning
    if inside is not None and inside.positions == "renumbered":
        for index, step in enumerate(steps):
            start = kept.shape[1] + index - 1 if index else 0
            step.position_ids = np.arange(start, start + step.hidden.shape[1])[None]
