"""The self-check of pictures so large that their tokens are resampled.

No tower runs on them, which would take minutes: the pruner's graph gets random features instead, and what it
makes of them is compared with what transformers makes of the same ones.
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
from visprune.export.verify.verify_pictures import Sample
from visprune.manifest import Manifest
from visprune.pruning.signals import SIGNALS
from visprune.runtime.backends.runner import to_numpy
from visprune.runtime.vision.arrangement import arrange
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.pictures import Picture

__all__ = ["Resampled", "compare_resampled", "resampled"]


@dataclass(frozen=True, slots=True)
class Resampled:
    """A large picture, and what the pruner's graph is given of it."""

    sample: Sample
    feeds: Arrays


def resampled(manifest: Manifest, features: Features, signals: Sequence[str], width: int) -> Resampled | None:
    """The smallest picture that is resampled, if any is, with random features of the tower.

    Args:
        manifest: Of the bundle.
        features: Which tokens are visual.
        signals: That the pruner reads.
        width: Of a token, Dv.
    """
    tiling = features.tiling
    if tiling is None or not features.resamples:
        return None
    for size in sorted(tiling.pinpoints, key=lambda size: size[0] * size[1]):
        arrangement = arrange(size, tiling)
        if arrangement.sources.shape[2] > 1:
            break
    else:
        return None
    picture = Picture(np.empty((0, features.channels, 1, 1), np.float32), arrangement)
    random = np.random.default_rng(0)
    count = features.layout.visual_tokens
    feeds = {
        n: to_numpy(v) for n, v in Keep(manifest.pruning.keep_tokens).feeds(manifest.pruning, picture).items()
    }
    feeds["vision_features"] = random.standard_normal((arrangement.tiles, count, width), np.float32)
    for name in signals:
        feeds[name] = random.random((arrangement.tiles, *SIGNALS[name].shape(count)), np.float32)
    return Resampled(Sample(picture, size), feeds)


@torch.no_grad()
def compare_resampled(
    check: Check, manifest: Manifest, model: Any, parts: Parts, case: Resampled, given: Arrays
) -> None:
    """Compare the tokens that the graph put out with transformers' own of the same places."""
    dtype = np.dtype(manifest.dtype)
    features = torch.from_numpy(case.feeds["vision_features"].astype(dtype).astype(np.float32))
    (whole,), _ = model.model.pack_image_features(
        [parts.projector(features)],
        torch.tensor([case.sample.size]),
        image_newline=parts.image_newline,
        vision_aspect_ratio=model.config.vision_aspect_ratio,
    )
    keep, arrangement = Keep(manifest.pruning.keep_tokens), case.sample.picture.arrangement
    tokens: NDArray[np.int64] = keep.chosen(manifest.pruning, arrangement, given["keep_indices"])[0]
    rows = case.sample.rows(tokens, always_kept=0)
    check.close("token_pruner resampled", given["image_features"], whole[rows], "a picture of many tiles")
