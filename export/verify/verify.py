"""The self-check of an export: what ONNX Runtime computes against what PyTorch computes.

Each graph is fed the same inputs as the checkpoint's own modules, then the whole chain is compared
with transformers: the logits of an unpruned prompt, and greedy tokens with the same tokens pruned. This
file compares everything before the decoder, `verify_decoder.py` the decoder, and `verify_layers.py` its
layers where memory does not hold it. Graphs are opened one after another, so that memory holds one at a
time.
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
from visprune.export.verify.compare import CHAINED_TOLERANCE, KEPT_TOLERANCE, Arrays, Check, Graphs, release
from visprune.export.verify.verify_decoder import NEW_TOKENS, compare_decoder, refer
from visprune.export.verify.verify_layers import compare_layers
from visprune.export.verify.verify_pictures import Sample, prompt, samples
from visprune.export.verify.verify_resampling import Resampled, compare_resampled, resampled
from visprune.manifest import Manifest, Parity, Scope
from visprune.pruning.base import VisionPruner
from visprune.runtime.backends.runner import to_numpy
from visprune.runtime.vision.kept_tokens import Keep

__all__ = ["comparisons", "verify"]


def comparisons(manifest: Manifest, pruner: VisionPruner, cuts: Cuts, scope: Scope) -> int:
    """How many there will be, for a progress display."""
    points = len(cuts.places) if cuts.pruner else 0
    mixes = manifest.tiling is not None and manifest.tiling.max_tiles is not None
    before = 5 + len(pruner.signals) + (1 if points else 0) + mixes
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
        bundle: Complete but for its parity result.
        checkpoint: Loaded here, between the small graphs and the decoder, so that never both the
            decoder and its reference are in memory; and its decoder not at all where layers are compared.
        features: Which tokens are visual.
        methods: The one before the LLM, and what is cut and pruned inside it.
        scope: Whether the decoder is compared as a whole or layer by layer.
        report: Called with the name of each comparison made.

    Raises:
        ParityError: A difference is larger than the tolerance.
    """
    manifest, pruner = bundle.manifest, methods[0]
    check, run = Check(manifest.dtype, report), Graphs(bundle, low_memory=scope == "layers")
    shown = samples(features)
    # Both pictures pruned; the first one whole.
    keeps = (Keep(manifest.pruning.keep_tokens), Keep(features.layout.visual_tokens))
    cases = [(keeps[0], sample) for sample in shown] + [(keeps[1], shown[0])]
    encoded = run.run("vision_encoder", [{"pixel_values": sample.picture.pixels} for sample in shown])
    feeds: list[Arrays] = []
    for (keep, sample), vision in zip(cases, [*encoded, encoded[0]], strict=True):
        named = {"vision_features": vision["image_features"]} | {n: vision[n] for n in pruner.signals}
        feeds.append(
            {n: to_numpy(v) for n, v in keep.feeds(manifest.pruning, sample.picture).items()} | named
        )
    large = resampled(manifest, features, pruner.signals, encoded[0]["image_features"].shape[-1])
    pruned = run.run("token_pruner", [*feeds, *([large.feeds] if large else [])])
    parts = (pruned[: len(shown)], pruned[len(shown) : len(feeds)])
    prompts = [prompt(manifest, [len(p["image_features"]) for p in part]) for part in parts]
    embedded = run.run(
        "embedding",
        [
            {"input_ids": ids.numpy(), "image_features": np.concatenate([p["image_features"] for p in part])}
            for ids, part in zip(prompts, parts, strict=True)
        ],
    )
    mixed = (large, pruned[-1]) if large else None
    seen = _Seen(shown, prompts, encoded, feeds[: len(shown)], parts[0], embedded[0], mixed)
    model, weights = open_model(checkpoint)
    model.float()  # the reference is float32, whatever the checkpoint and the target are
    decoder, cuts = model.model.language_model, methods[1]
    if scope == "layers":
        with weights.held(model.model, torch.float32, but=decoder.layers):
            embedded_prompt = _compare_inputs(check, model, manifest, features, methods, seen)
        release()
        family = models.family(checkpoint.model_type)
        compare_layers(check, run, family.parts(model), weights, cuts, embedded_prompt)
        return Parity(verified=True, rows=tuple(check.rows), scope=scope)
    visual = [ids == manifest.text.image_token_id for ids in prompts]
    room = manifest.decoder.context_limit
    # Graphs have no sliding window, and need none within it: that is where they are compared.
    fitting = [
        _fitting(row[0], most) for row, most in zip(visual, (room - NEW_TOKENS + 1, room), strict=True)
    ]
    with weights.held(model, torch.float32):
        embedded_prompt = _compare_inputs(check, model, manifest, features, methods, seen)
        release()
        parts = models.family(checkpoint.model_type).parts(model)
        unpruned = _unpruned(model, parts, prompts[1], shown[0], fitting[1])
        embeds, is_visual = (tensor[:, fitting[0]] for tensor in embedded_prompt)
        reference = refer(parts, embeds, is_visual, manifest, cuts, unpruned)
    release()
    given = [
        (part["inputs_embeds"][:, places.numpy()], row[:, places].numpy())
        for part, row, places in zip(embedded, visual, fitting, strict=True)
    ]
    compare_decoder(check, run, given, reference)
    return Parity(verified=True, rows=tuple(check.rows))


def _fitting(visual: Tensor, most: int) -> Tensor:
    """Places of a prompt that are at most so many: visual tokens are left out first, but for one, then text.

    Args:
        visual: [S] bool.
        most: Places.
    """
    excess = max(0, len(visual) - most)
    spare = torch.nonzero(visual).flatten()[1:]
    words = torch.nonzero(~visual).flatten()
    drop = torch.cat([spare.flip(0), words])[:excess]
    keep = torch.ones(len(visual), dtype=torch.bool)
    keep[drop] = False
    return torch.nonzero(keep).flatten()


def _unpruned(model: Any, parts: Parts, ids: Tensor, sample: Sample, places: Tensor) -> Tensor:
    """The logits after a prompt with all tokens of a picture, by transformers: [1, 1, V].

    By its whole model where that can take the prompt; else by its decoder, from the embeddings of `places`.
    """
    placeholder = model.config.image_token_id
    table = parts.language_model.get_input_embeddings()
    if len(places) == ids.shape[1] and placeholder < table.num_embeddings:
        logits: Tensor = model(input_ids=ids, **sample.inputs(), logits_to_keep=1).logits
        return logits
    (embeds,) = graphs.Embedding(parts, placeholder)(ids, sample.whole(model))
    hidden = parts.language_model(inputs_embeds=embeds[:, places]).last_hidden_state
    return parts.lm_head(hidden[:, -1:])  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the graphs before the decoder were given, the pruned prompt first, and what they gave for that."""

    samples: list[Sample]
    prompts: list[Tensor]
    vision: list[Arrays]
    feeds: list[Arrays]
    pruned: list[Arrays]
    embedded: Arrays
    resampled: tuple[Resampled, Arrays] | None


def _compare_inputs(
    check: Check,
    model: Any,
    manifest: Manifest,
    features: Features,
    methods: tuple[VisionPruner, Cuts],
    seen: _Seen,
) -> tuple[Tensor, Tensor]:
    """Compare everything before the decoder; give PyTorch's input embeddings, and which are visual."""
    pruner, cuts = methods
    parts = models.family(model.config.model_type).parts(model)
    attention.register()
    parts.tower.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
    tower = models.tower(model.config.vision_config.model_type)
    encoder = graphs.VisionEncoder(parts, tower, features, pruner.signals)
    want = [encoder(torch.from_numpy(sample.picture.pixels)) for sample in seen.samples]
    names = ("image_features", *pruner.signals)
    for name, values in zip(names, zip(*want, strict=True), strict=True):
        got = np.concatenate([vision[name] for vision in seen.vision])
        check.close(f"vision_encoder {name}", got, torch.cat(values))

    wrapper = pruner_module(parts, features, pruner, manifest.pruning.budget.scope)
    keep = Keep(manifest.pruning.keep_tokens)
    kept: list[NDArray[np.int64]] = []
    from_mine, from_own = kept.copy(), kept.copy()
    for sample, feeds, pruned, values in zip(seen.samples, seen.feeds, seen.pruned, want, strict=True):
        mine = [torch.from_numpy(feeds[n].astype(np.float32)) for n in ("vision_features", *pruner.signals)]
        choices = (pruned["keep_indices"], _select(wrapper, mine, feeds), _select(wrapper, values, feeds))
        arrangement = sample.picture.arrangement
        tokens = [keep.chosen(manifest.pruning, arrangement, indices)[0] for indices in choices]
        for found, its in zip((kept, from_mine, from_own), tokens, strict=True):
            found.append(its)
    tolerance = (CHAINED_TOLERANCE if getattr(pruner, "chained", False) else KEPT_TOLERANCE)[check.dtype]
    # A graph projects in its own precision, so projected tokens are not quite the same on both sides.
    check.kept("token_pruner keep_indices", kept, from_mine, tolerance if wrapper.projects_first else 0.0)
    check.kept("kept set", kept, from_own, tolerance)

    parts.tower.set_attn_implementation("eager")
    whole = [sample.whole(model) for sample in seen.samples]
    rows = [
        sample.rows(tokens, features.always_kept) for sample, tokens in zip(seen.samples, kept, strict=True)
    ]
    image_features = torch.cat([tokens[index] for tokens, index in zip(whole, rows, strict=True)])
    got = np.concatenate([pruned["image_features"] for pruned in seen.pruned])
    check.close("token_pruner image_features", got, image_features)
    if seen.resampled is not None:
        compare_resampled(check, manifest, model, parts, *seen.resampled)
    embedding = graphs.Embedding(parts, model.config.image_token_id, tell_visual=True)
    embeds, is_visual = embedding(seen.prompts[0], image_features)
    check.close("embedding inputs_embeds", seen.embedded["inputs_embeds"], embeds)
    if cuts.pruner is not None:
        equal = np.array_equal(seen.embedded["is_visual"], is_visual.numpy())
        check.add("embedding is_visual", float(not equal), 0.0, "")
    return embeds, is_visual


def _select(
    wrapper: graphs.TokenPruner | TilePruner, encoded: Sequence[Tensor], feeds: Arrays
) -> NDArray[np.int64]:
    """The choice of the module that became a graph, from features and signals: [T, K]."""
    given = {name: torch.tensor(array) for name, array in feeds.items()}
    features, *signals = encoded
    if isinstance(wrapper, TilePruner):
        maps = [given[name] for name in ("token_places", "newline_places", "image_tokens")]
        resampling = [given[name] for name in wrapper.resampling]
        _, indices = wrapper(features, given["keep_tokens"], *maps, resampling, signals)
    else:
        _, indices = wrapper(features, given["keep_tokens"], signals)
    chosen: NDArray[np.int64] = indices.numpy()
    return chosen
