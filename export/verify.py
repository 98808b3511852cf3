"""The self-check of an export: what ONNX Runtime computes against what PyTorch computes.

Each graph is fed the same inputs as the checkpoint's own modules, then the whole chain is compared
with transformers: the logits of an unpruned prompt, and greedy tokens with the same tokens pruned. This
file compares everything before the decoder, `verify_decoder.py` the rest. Graphs are opened one after
another, so that memory holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visprune.bundle import Bundle
from visprune.export import attention, graphs, models
from visprune.export.checkpoint import Checkpoint
from visprune.export.compare import CHAINED_TOLERANCE, KEPT_TOLERANCE, Arrays, Check, Graphs, release
from visprune.export.loading import load_model
from visprune.export.parts import Features
from visprune.export.plan import Cuts
from visprune.export.verify_decoder import Reference, compare_decoder, refer
from visprune.manifest import Manifest, Parity
from visprune.pruning.base import VisionPruner

__all__ = ["ROWS", "ROWS_PER_POINT", "verify"]

# Comparisons made besides one for each signal, for a progress display; and how many more with prune points.
ROWS = 9
ROWS_PER_POINT = 3
IMAGES = 2


@torch.no_grad()
def verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    features: Features,
    methods: tuple[VisionPruner, Cuts],
    report: Callable[[str], None],
) -> Parity:
    """Compare a written bundle with the checkpoint it came from.

    Args:
        bundle: Complete but for its parity result.
        checkpoint: Loaded here, between the small graphs and the decoder, so that never both the
            decoder and its reference are in memory.
        features: Which tokens are visual.
        methods: The one before the LLM, and what is cut and pruned inside it.
        report: Called with the name of each comparison made.

    Raises:
        ParityError: A difference is larger than the tolerance.
    """
    manifest, pruner = bundle.manifest, methods[0]
    check, run = Check(manifest.dtype, report), Graphs(bundle)
    pixels = _pictures(features)
    # Both pictures pruned; the first one whole.
    cases = ((manifest.pruning.keep_tokens, IMAGES), (features.layout.visual_tokens, 1))
    prompts = [_prompt(bundle, count + features.always_kept, images) for count, images in cases]

    (vision,) = run.run("vision_encoder", [{"pixel_values": pixels.numpy()}])
    named = {"vision_features": vision["image_features"], **{name: vision[name] for name in pruner.signals}}
    pruned = run.run(
        "token_pruner",
        [
            {name: value[:images] for name, value in named.items()} | {"keep_tokens": np.array(count)}
            for count, images in cases
        ],
    )
    embedded = run.run(
        "embedding",
        [
            {"input_ids": ids.numpy(), "image_features": part["image_features"]}
            for ids, part in zip(prompts, pruned, strict=True)
        ],
    )
    seen = _Seen(pixels, prompts, vision, pruned[0], embedded[0])
    reference = _compare_inputs(check, checkpoint, manifest, features, methods, seen)
    release()
    visual = [(ids == manifest.text.image_token_id).numpy() for ids in prompts]
    embeds = [part["inputs_embeds"] for part in embedded]
    compare_decoder(check, run, list(zip(embeds, visual, strict=True)), reference)
    return Parity(verified=True, rows=tuple(check.rows))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the graphs before the decoder were given, the pruned prompt first, and what they gave."""

    pixels: Tensor
    prompts: list[Tensor]
    vision: Arrays
    pruned: Arrays
    embedded: Arrays


def _compare_inputs(
    check: Check,
    checkpoint: Checkpoint,
    manifest: Manifest,
    features: Features,
    methods: tuple[VisionPruner, Cuts],
    seen: _Seen,
) -> Reference:
    """Compare everything before the decoder; give what the decoder will be compared with."""
    pruner, cuts = methods
    pixels, prompts = seen.pixels, seen.prompts
    # The reference is float32, whatever the checkpoint and the target are.
    model = load_model(checkpoint).float()
    parts = models.family(checkpoint.model_type).parts(model)
    attention.register()
    parts.tower.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
    tower = models.tower(model.config.vision_config.model_type)
    want = graphs.VisionEncoder(parts, tower, features, pruner.signals)(pixels)
    for name, value in zip(("image_features", *pruner.signals), want, strict=True):
        check.close(f"vision_encoder {name}", seen.vision[name], value)

    wrapper = graphs.TokenPruner(parts, features, pruner)
    indices = seen.pruned["keep_indices"]
    keep = torch.tensor(indices.shape[1])
    mine = [torch.from_numpy(seen.vision[name]) for name in pruner.signals]
    tokens = torch.from_numpy(seen.vision["image_features"].astype(np.float32))
    _, same = wrapper(tokens, keep, mine)
    tolerance = (CHAINED_TOLERANCE if getattr(pruner, "chained", False) else KEPT_TOLERANCE)[check.dtype]
    # A graph projects in its own precision, so projected tokens are not quite the same on both sides.
    check.kept("token_pruner keep_indices", indices, same, tolerance if wrapper.projects_first else 0.0)
    projected = parts.projector(_gather(tokens, torch.from_numpy(indices), features))
    check.close("token_pruner image_features", seen.pruned["image_features"], projected)
    _, own = wrapper(want[0], keep, list(want[1:]))
    check.kept("kept set", indices, own, tolerance)

    image_features = parts.projector(_gather(want[0], torch.from_numpy(indices), features))
    embedding = graphs.Embedding(parts, model.config.image_token_id, tell_visual=True)
    embeds, is_visual = embedding(prompts[0], image_features)
    check.close("embedding inputs_embeds", seen.embedded["inputs_embeds"], embeds)
    if cuts.pruner is not None:
        same = np.array_equal(seen.embedded["is_visual"], is_visual.numpy())
        check.add("embedding is_visual", float(not same), 0.0, "")

    release()
    parts.tower.set_attn_implementation("eager")
    unpruned = model(input_ids=prompts[1], pixel_values=pixels[:1], logits_to_keep=1).logits
    return refer(parts, embeds, is_visual, manifest, cuts, unpruned)


def _gather(vision_features: Tensor, indices: Tensor, features: Features) -> Tensor:
    """The kept tokens of PyTorch's own features, by plain indexing."""
    fixed = torch.arange(features.always_kept).expand(len(indices), -1)
    order = torch.cat([fixed, indices + features.always_kept], dim=1)
    return torch.cat([tile[kept] for tile, kept in zip(vision_features, order, strict=True)])


def _pictures(features: Features) -> Tensor:
    """Two pictures with structure: smooth waves and noise, in the range of normalised pixels."""
    generator = torch.Generator().manual_seed(0)
    size = features.image_size
    line = torch.linspace(0, 6.28, size)
    waves = torch.sin(line[:, None] * 2) + torch.cos(line[None, :] * 3)
    noise = torch.randn(IMAGES, features.channels, size, size, generator=generator)
    return waves * torch.tensor([0.5, -0.5]).view(IMAGES, 1, 1, 1) + 0.5 * noise


def _prompt(bundle: Bundle, tokens_per_image: int, images: int) -> Tensor:
    """Four words, then for each image its placeholders and four more words: [1, S]."""
    text, decoder = bundle.manifest.text, bundle.manifest.decoder
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, decoder.vocab_size, (1 + images, 4), generator=generator)
    words = torch.where(words == text.image_token_id, 1 if text.image_token_id == 0 else 0, words)
    image = torch.full((tokens_per_image,), text.image_token_id)
    return torch.cat([words[0], *(part for line in words[1:] for part in (image, line))]).unsqueeze(0)
