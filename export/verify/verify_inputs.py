"""The comparison of everything before the decoder: the vision encoder, the pruner and the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visprune.export import models
from visprune.export.graph import attention, graphs
from visprune.export.graph.graph_specs import Cuts, pruner_module
from visprune.export.graph.tiles import TilePruner
from visprune.export.models.parts import Features
from visprune.export.verify.compare import CHAINED_TOLERANCE, KEPT_TOLERANCE, Arrays, Check
from visprune.export.verify.verify_pictures import VerifySample
from visprune.export.verify.verify_resampling import ResampledCase, compare_resampled
from visprune.manifest import Manifest
from visprune.pruning.base import VisionPruner
from visprune.runtime.vision.kept_tokens import Keep

__all__ = ["GraphResults", "compare_inputs"]


@dataclass(frozen=True, slots=True)
class GraphResults:
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


def compare_inputs(
    check: Check,
    model: Any,
    manifest: Manifest,
    features: Features,
    methods: tuple[VisionPruner, Cuts],
    results: GraphResults,
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
    tolerance = (CHAINED_TOLERANCE if wrapper.traits.chained else KEPT_TOLERANCE)[check.dtype]
    # A graph projects in its own precision, so a method that reads projected tokens may choose differently.
    exact, ordered = 0.0 if not wrapper.traits.projected else tolerance, not pruning.merges
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
    question = [given["question_embeds"].float()] if wrapper.traits.needs_text else []
    if isinstance(wrapper, TilePruner):
        maps = [given[name] for name in ("token_places", "newline_places", "image_tokens")]
        resampling = [given[name] for name in wrapper.resampling]
        found = wrapper(features, given["keep_tokens"], *maps, resampling, question, signals)
    else:
        found = wrapper(features, given["keep_tokens"], question, signals)
    outputs: tuple[Tensor, ...] = found
    return outputs
