"""The self-check of an export: a comparison of the bundle in ONNX Runtime with the checkpoint in PyTorch.

Each graph gets the same inputs as the checkpoint's own modules. Then all graphs together are compared with
transformers: by the logits of an unpruned prompt, and by greedy tokens after a pruned prompt. This file runs
the graphs and says what is compared when. `verify_inputs.py` compares everything before the decoder,
`verify_decoder.py` the decoder as a whole, and `verify_layers.py` its layers one by one if memory does not
hold it. Graphs are opened one after another, so that only one is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visprune.bundle import Bundle
from visprune.export import models
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.graph import graphs
from visprune.export.graph.graph_specs import Cuts
from visprune.export.graph.weightless import open_model
from visprune.export.models.parts import Features, Parts
from visprune.export.verify.compare import Arrays, Check, GraphRunner, free_memory
from visprune.export.verify.verify_decoder import NEW_TOKENS, compare_decoder, compute_reference
from visprune.export.verify.verify_inputs import GraphResults, compare_inputs
from visprune.export.verify.verify_layers import compare_layers
from visprune.export.verify.verify_pictures import VerifySample, verify_prompt, verify_samples
from visprune.export.verify.verify_resampling import resampled_case
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
    seen = [*shown, unpruned] if manifest.pruning.resizes else shown
    encoded = runner.run("vision_encoder", [{"pixel_values": sample.picture.pixels} for sample in seen])
    if not manifest.pruning.resizes:
        encoded.append(encoded[0])  # the unpruned image has the pixels of the first
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
    results = GraphResults(shown, prompts, encoded[:count], feeds[:count], by_prompt[0], embedded[0], mixed)
    model, weights = open_model(checkpoint)
    model.float()  # the reference is always float32
    decoder, cuts = model.model.language_model, methods[1]
    if scope == "layers":
        with weights.loaded(model.model, torch.float32, exclude=decoder.layers):
            embedded_prompt = compare_inputs(check, model, manifest, features, methods, results)
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
        embedded_prompt = compare_inputs(check, model, manifest, features, methods, results)
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
