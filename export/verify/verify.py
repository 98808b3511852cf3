"""The self-check of an export: a comparison of the bundle in ONNX Runtime with the checkpoint in PyTorch.

Each graph gets the same inputs as the checkpoint's own modules. Then all graphs together are compared with
transformers: by the logits of an unpruned prompt, and by greedy tokens after a pruned prompt. This file
compares everything before the decoder, `verify_decoder.py` the decoder as a whole, and `verify_layers.py` its
layers one by one if memory does not hold it. Graphs are opened one after another, so that only one is in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visprune.bundle import Bundle
from visprune.export import models
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.graph import attention, graphs
from visprune.export.graph.graph_specs import Cuts, pruner_module
from visprune.export.graph.tiles import TilePruner
from visprune.export.graph.weightless import open_model
from visprune.export.models.parts import Features, Parts
from visprune.export.verify.compare import (
    CHAINED_TOLERANCE,
    KEPT_TOLERANCE,
    Arrays,
    Check,
    GraphRunner,
    free_memory,
)
from visprune.export.verify.verify_decoder import NEW_TOKENS, compare_decoder, compute_reference
from visprune.export.verify.verify_layers import compare_layers
from visprune.export.verify.verify_pictures import VerifySample, verify_prompt, verify_samples
from visprune.export.verify.verify_resampling import ResampledCase, compare_resampled, resampled_case
from visprune.manifest import Manifest, Parity, Scope
from visprune.pruning.base import VisionPruner
from visprune.runtime.vision.kept_tokens import Keep

__all__ = ["count_comparisons", "verify"]


def count_comparisons(manifest: Manifest, pruner: VisionPruner, cuts: Cuts, scope: Scope) -> int:
    """Return the number of comparisons that `verify` will make, for a progress display."""
    points = len(cuts.places) if cuts.pruner else 0
    mixes = manifest.tiling is not None and manifest.tiling.resamples
    before = 5 + len(pruner.signals) + len(cuts.marks) + mixes
    num_layers = manifest.decoder.num_layers
    decoder = num_layers + sum(place % 2 for place in cuts.places) + 1 if scope == "layers" else 4
    return before + decoder + 3 * points


@torch.no_grad()
def verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    features: Features,
    methods: tuple[VisionPruner, Cuts],
    scope: Scope,
    report: Callable[[str], None],
) -> Parity:
    """Compare a written bundle with the checkpoint it came from.

    Args:
        bundle: A bundle that is complete except for its parity result.
        checkpoint: The checkpoint. It is loaded after the small graphs ran and released before the decoder
            runs, so that the decoder and its reference are never in memory together. With the scope "layers"
            its decoder is never loaded as a whole.
        features: Which tokens are visual.
        methods: The method before the LLM, and how the decoder is cut and pruned.
        scope: Whether the decoder is compared as a whole or layer by layer.
        report: Called with the name of each comparison.

    Returns:
        The manifest's parity result.

    Raises:
        ParityError: A difference is larger than the tolerance.
    """
    manifest, pruner = bundle.manifest, methods[0]
    check, runner = Check(manifest.dtype, report), GraphRunner(bundle, low_memory=scope == "layers")
    # The first prompt shows both images pruned, the second the first image unpruned.
    keeps = (Keep(manifest.pruning.keep_tokens), Keep(features.layout.visual_tokens))
    shown = verify_samples(features, manifest.pruning, keeps[0].tokens)
    unpruned = verify_samples(features, manifest.pruning, keeps[1].tokens)[0]
    cases = [(keeps[0], sample) for sample in shown] + [(keeps[1], unpruned)]
    encoded = runner.run("vision_encoder", [{"pixel_values": sample.picture.pixels} for _, sample in cases])
    question = _question(manifest, runner) if manifest.pruning.needs_text else {}
    feeds: list[Arrays] = []
    for (keep, sample), vision in zip(cases, encoded, strict=True):
        named = {"vision_features": vision["image_features"]} | {n: vision[n] for n in pruner.signals}
        feeds.append(sample.pruner_feeds(manifest.pruning, keep) | named | question)
    large = resampled_case(manifest, features, pruner.signals, encoded[0]["image_features"].shape[-1])
    if large is not None:
        large.feeds.update(question)
    pruned = runner.run("token_pruner", [*feeds, *([large.feeds] if large else [])])
    by_prompt = (pruned[: len(shown)], pruned[len(shown) : len(feeds)])
    prompts = [verify_prompt(manifest, [len(p["image_features"]) for p in outputs]) for outputs in by_prompt]
    embedded = runner.run(
        "embedding",
        [
            {
                "input_ids": ids.numpy(),
                "image_features": np.concatenate([p["image_features"] for p in outputs]),
            }
            for ids, outputs in zip(prompts, by_prompt, strict=True)
        ],
    )
    mixed = (large, pruned[-1]) if large else None
    count = len(shown)
    results = _GraphResults(shown, prompts, encoded[:count], feeds[:count], by_prompt[0], embedded[0], mixed)
    model, weights = open_model(checkpoint)
    model.float()  # the reference is always float32
    decoder, cuts = model.model.language_model, methods[1]
    if scope == "layers":
        with weights.loaded(model.model, torch.float32, exclude=decoder.layers):
            embedded_prompt = _compare_inputs(check, model, manifest, features, methods, results)
        free_memory()
        family = models.family(checkpoint.model_type)
        compare_layers(check, runner, family.parts(model), weights, cuts, embedded_prompt)
        return Parity(verified=True, rows=tuple(check.rows), scope=scope)
    visual = [ids == manifest.text.image_token_id for ids in prompts]
    limit = manifest.decoder.context_limit
    # Graphs have no sliding window, so they are compared with prompts that fit into it.
    fitting = [
        _truncated(row[0], most) for row, most in zip(visual, (limit - NEW_TOKENS + 1, limit), strict=True)
    ]
    with weights.loaded(model, torch.float32):
        embedded_prompt = _compare_inputs(check, model, manifest, features, methods, results)
        free_memory()
        parts = models.family(checkpoint.model_type).parts(model)
        logits = _unpruned_logits(model, parts, prompts[1], unpruned, fitting[1])
        embeds, is_visual = (tensor[:, fitting[0]] for tensor in embedded_prompt)
        reference = compute_reference(parts, embeds, is_visual, manifest, cuts, logits)
    free_memory()
    given = [
        (outputs["inputs_embeds"][:, places.numpy()], row[:, places].numpy())
        for outputs, row, places in zip(embedded, visual, fitting, strict=True)
    ]
    compare_decoder(check, runner, given, reference)
    return Parity(verified=True, rows=tuple(check.rows))


def _question(manifest: Manifest, runner: GraphRunner) -> Arrays:
    """Return the embeddings of a question of six random tokens, by the name of the pruner's input."""
    graph = manifest.graphs["embedding"]
    width = next(spec.shape[-1] for spec in graph.outputs if spec.name == "inputs_embeds")
    ids = np.random.default_rng(0).integers(0, manifest.decoder.vocab_size, (1, 6))
    ids[ids == manifest.text.image_token_id] = 0
    feed: Arrays = {"input_ids": ids, "image_features": np.zeros((0, int(width)), dtype=np.float32)}
    return {"question_embeds": runner.run("embedding", [feed])[0]["inputs_embeds"]}


def _truncated(visual: Tensor, most: int) -> Tensor:
    """Return the positions of a prompt that remain if it is shortened to at most `most` tokens.

    Visual tokens are dropped first, from the end and except for the first one; then text, from the beginning.

    Args:
        visual: Which tokens of the prompt are visual, [S] bool.
        most: Number of tokens that may remain.

    Returns:
        Ascending positions, int64.
    """
    excess = max(0, len(visual) - most)
    visual_tokens = torch.nonzero(visual).flatten()[1:]
    text_tokens = torch.nonzero(~visual).flatten()
    drop = torch.cat([visual_tokens.flip(0), text_tokens])[:excess]
    keep = torch.ones(len(visual), dtype=torch.bool)
    keep[drop] = False
    return torch.nonzero(keep).flatten()


def _unpruned_logits(model: Any, parts: Parts, ids: Tensor, sample: VerifySample, places: Tensor) -> Tensor:
    """Return transformers' logits after a prompt with an unpruned image: [1, 1, V].

    The whole model computes them if it can take the prompt. Otherwise its decoder computes them from the
    embeddings at the positions `places`.
    """
    placeholder = model.config.image_token_id
    table = parts.language_model.get_input_embeddings()
    if len(places) == ids.shape[1] and placeholder < table.num_embeddings:
        logits: Tensor = model(input_ids=ids, **sample.inputs(), logits_to_keep=1).logits
        return logits
    (embeds,) = graphs.Embedding(parts, placeholder)(ids, sample.all_tokens(model))
    hidden = parts.language_model(inputs_embeds=embeds[:, places]).last_hidden_state
    return parts.lm_head(hidden[:, -1:])  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _GraphResults:
    """Inputs and outputs of the graphs before the decoder.

    Attributes:
        samples: The images.
        prompts: Token ids [1, S] of the pruned prompt and of the unpruned one.
        vision: Outputs of the vision encoder for each image.
        feeds: Inputs of the pruner for each image of the pruned prompt.
        pruned: Outputs of the pruner for these inputs.
        embedded: Outputs of the embedding for the pruned prompt.
        resampled: A resampled image with the outputs of the pruner for it, if images are resampled.
    """

    samples: list[VerifySample]
    prompts: list[Tensor]
    vision: list[Arrays]
    feeds: list[Arrays]
    pruned: list[Arrays]
    embedded: Arrays
    resampled: tuple[ResampledCase, Arrays] | None


def _compare_inputs(
    check: Check,
    model: Any,
    manifest: Manifest,
    features: Features,
    methods: tuple[VisionPruner, Cuts],
    results: _GraphResults,
) -> tuple[Tensor, Tensor]:
    """Compare everything before the decoder.

    Returns:
        PyTorch's embeddings [1, S, D] of the pruned prompt, and which of them are visual, [1, S] bool.
    """
    pruner, cuts = methods
    parts = models.family(model.config.model_type).parts(model)
    attention.register()
    parts.tower.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
    tower = models.tower(model.config.vision_config.model_type)
    pruning = manifest.pruning
    encoder = graphs.VisionEncoder(parts, tower, features, pruner.signals, resizes=pruning.resizes)
    want = [encoder(torch.from_numpy(sample.picture.pixels)) for sample in results.samples]
    names = ("image_features", *pruner.signals)
    for name, values in zip(names, zip(*want, strict=True), strict=True):
        got = np.concatenate([vision[name] for vision in results.vision])
        check.close(f"vision_encoder {name}", got, torch.cat(values))

    wrapper = pruner_module(parts, features, pruner, pruning.budget.scope)
    keep = Keep(pruning.keep_tokens)
    kept: list[NDArray[np.int64]] = []
    from_graph, from_torch = kept.copy(), kept.copy()
    made = []
    for sample, feeds, pruned, values in zip(
        results.samples, results.feeds, results.pruned, want, strict=True
    ):
        encoded = [
            torch.from_numpy(feeds[n].astype(np.float32)) for n in ("vision_features", *pruner.signals)
        ]
        outputs, other = _prune(wrapper, encoded, feeds), _prune(wrapper, values, feeds)
        made.append(outputs[0])
        choices = (pruned["keep_indices"], outputs[1].numpy(), other[1].numpy())
        arrangement = sample.picture.arrangement
        tokens = [keep.chosen(pruning, arrangement, indices)[0] for indices in choices]
        for choice, indices in zip((kept, from_graph, from_torch), tokens, strict=True):
            choice.append(indices)
    tolerance = (CHAINED_TOLERANCE if getattr(pruner, "chained", False) else KEPT_TOLERANCE)[check.dtype]
    # A graph projects in its own precision, so a method that reads projected tokens may choose differently.
    exact, ordered = 0.0 if not wrapper.projects_first else tolerance, not pruning.merges
    check.kept("token_pruner keep_indices", kept, from_graph, exact, ordered=ordered)
    check.kept("kept set", kept, from_torch, tolerance, ordered=ordered)

    parts.tower.set_attn_implementation("eager")
    got = np.concatenate([pruned["image_features"] for pruned in results.pruned])
    if pruning.merges or pruning.resizes:  # transformers has no such tokens
        check.tokens("token_pruner image_features", got, torch.cat(made), tolerance)
        image_features = torch.from_numpy(got.astype(np.float32))
    else:
        whole = [sample.all_tokens(model) for sample in results.samples]
        rows = [
            sample.rows(tokens, features.always_kept)
            for sample, tokens in zip(results.samples, kept, strict=True)
        ]
        image_features = torch.cat([tokens[index] for tokens, index in zip(whole, rows, strict=True)])
        check.close("token_pruner image_features", got, image_features)
    if results.resampled is not None:
        compare_resampled(check, manifest, model, parts, *results.resampled)
    embedding = graphs.Embedding(parts, model.config.image_token_id, tell_visual=True)
    embeds, is_visual = embedding(results.prompts[0], image_features)
    check.close("embedding inputs_embeds", results.embedded["inputs_embeds"], embeds)
    if cuts.pruner is not None:
        equal = np.array_equal(results.embedded["is_visual"], is_visual.numpy())
        check.add("embedding is_visual", float(not equal), 0.0, "")
    if cuts.rating is not None:
        # From the graph's own embeddings: a token near the mean must not fall on the other side by rounding.
        found = cuts.rating.raters(torch.from_numpy(results.embedded["inputs_embeds"]), is_visual)
        equal = np.array_equal(results.embedded["is_rater"], found.numpy())
        check.add("embedding is_rater", float(not equal), 0.0, f"{int(found.sum())} tokens rate")
    return embeds, is_visual


def _prune(
    wrapper: graphs.TokenPruner | TilePruner, encoded: Sequence[Tensor], feeds: Arrays
) -> tuple[Tensor, ...]:
    """Return the outputs of the pruner in PyTorch, from features and signals."""
    given = {name: torch.tensor(array) for name, array in feeds.items()}
    features, *signals = encoded
    question = [given["question_embeds"].float()] if wrapper.needs_text else []
    if isinstance(wrapper, TilePruner):
        maps = [given[name] for name in ("token_places", "newline_places", "image_tokens")]
        resampling = [given[name] for name in wrapper.resampling]
        found = wrapper(features, given["keep_tokens"], *maps, resampling, question, signals)
    else:
        found = wrapper(features, given["keep_tokens"], question, signals)
    outputs: tuple[Tensor, ...] = found
    return outputs
