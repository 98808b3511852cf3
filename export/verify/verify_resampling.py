"""The self-check of images so large that their tokens are resampled, and of videos whose frames are averaged.

The vision tower does not run on such an input, because that would take minutes. The pruner's graph gets
random features instead, and its output is compared with the tokens that transformers makes of the same
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visprune.export.models.parts import Features, Parts
from visprune.export.verify.compare import Arrays, Check
from visprune.export.verify.verify_pictures import VerifySample
from visprune.manifest import Manifest, Pruning
from visprune.runtime.vision.arrangement import Arrangement, arrange, arrange_video
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.pictures import Picture
from visprune.tiling import Tiling

__all__ = ["ResampledCase", "compare_resampled", "resampled_case"]


@dataclass(frozen=True, slots=True)
class ResampledCase:
    """A large image or a video, and the inputs of the pruner's graph for it."""

    sample: VerifySample
    feeds: Arrays


def resampled_case(
    manifest: Manifest, features: Features, signals: Sequence[str], width: int
) -> ResampledCase | None:
    """Return the smallest image that is resampled, or a video, with random features; None if there is none.

    Args:
        manifest: Manifest of the bundle.
        features: Which tokens are visual.
        signals: Names of the signals that the pruner reads.
        width: Dv, the size of a token of the vision tower.
    """
    tiling = features.tiling
    found = _smallest(tiling) if tiling is not None and tiling.resamples else None
    if found is None:
        return None
    arrangement, size = found
    sample = VerifySample(Picture(np.empty((0, features.channels, 1, 1), np.float32), arrangement), size)
    random = np.random.default_rng(0)
    count = features.layout.visual_tokens
    feeds = sample.pruner_feeds(manifest.pruning, _keep(manifest.pruning))
    feeds["vision_features"] = random.standard_normal((arrangement.tiles, count, width), np.float32)
    for name in signals:
        feeds[name] = random.random((arrangement.tiles, count), np.float32)  # no other signal is allowed
    return ResampledCase(sample, feeds)


def _keep(pruning: Pruning) -> Keep:
    """Return how many tokens are kept: all if the grid would be made smaller, as transformers never does."""
    budget = pruning.budget
    return Keep(budget.visual_tokens if budget.unit == "square" else pruning.keep_tokens)


def _smallest(tiling: Tiling) -> tuple[Arrangement, tuple[int, int] | None] | None:
    """Return the arrangement of `resampled_case`, and the size of its image; a video has no size."""
    if tiling.frame_pooling is not None:
        return arrange_video(2, tiling), None
    for size in sorted(tiling.pinpoints, key=lambda size: size[0] * size[1]):
        arrangement = arrange(size, tiling)
        if arrangement.sources.shape[2] > 1:
            return arrangement, size
    return None


@torch.no_grad()
def compare_resampled(
    check: Check, manifest: Manifest, model: Any, parts: Parts, case: ResampledCase, given: Arrays
) -> None:
    """Compare the tokens that the graph returned with those of transformers at the same places.

    Args:
        check: Collects the comparison.
        manifest: Manifest of the bundle.
        model: The model of transformers.
        parts: Its modules.
        case: The image or video, and the inputs of the graph.
        given: The outputs of the graph.

    Raises:
        ParityError: The difference is larger than the tolerance.
    """
    dtype = np.dtype(manifest.dtype)
    features = torch.from_numpy(case.feeds["vision_features"].astype(dtype).astype(np.float32))
    if case.sample.size is None:
        whole, note = parts.projector(model.model.vision_resampler(features)).flatten(0, 1), "a video"
    else:
        (whole,), _ = model.model.pack_image_features(
            [parts.projector(features)],
            torch.tensor([case.sample.size]),
            image_newline=parts.image_newline,
            vision_aspect_ratio=model.config.vision_aspect_ratio,
        )
        note = "a picture of many tiles"
    keep, arrangement = Keep(manifest.pruning.keep_tokens), case.sample.picture.arrangement
    tokens: NDArray[np.int64] = keep.chosen(manifest.pruning, arrangement, given["keep_indices"])[0]
    rows = case.sample.rows(tokens, always_kept=0)
    check.close("token_pruner resampled", given["image_features"], whole[rows], note)
