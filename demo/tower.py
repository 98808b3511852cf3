"""Stage 1 of the demo model: the vision tower learns to see, from labels of patches and of whole images.

It trains on two objectives at once. Each patch of the feature layer must name the thing in it; this makes the
features useful for the language model. And the CLS token of the last layer must describe the image, as a
caption would; this makes attention go to the things, which attention-based pruning relies on. The heads are
discarded. The last layer stays in the checkpoint unused, as in CLIP with `vision_feature_layer=-2`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel

from visprune.demo.checkpoint import PATCH
from visprune.demo.scenes import CATEGORIES, COLORS, SIZE, VALUES, Thing

__all__ = ["TowerSettings", "coverage", "encode_images", "pixels", "train_tower"]

_SIDE = SIZE // PATCH
_PLACES = ("top left", "top right", "bottom left", "bottom right")
_FIRST_VALUE = dict(zip(CATEGORIES, np.cumsum([0, *(len(v) for v in VALUES.values())]), strict=False))
_DENSE = (1 + len(CATEGORIES), sum(len(v) for v in VALUES.values()), len(COLORS), len(_PLACES))
# The caption consists of the value, the colour and the place of the thing of each category.
_FACTS = tuple(size for v in VALUES.values() for size in (len(v), len(COLORS), len(_PLACES)))
_COVERED = 14  # a patch must name a thing if its box covers at least this many of the patch's 64 pixels
_IGNORE = -100


@dataclass(frozen=True, slots=True)
class TowerSettings:
    """Settings of the training in stage 1: in each cycle, the learning rate decays by a cosine."""

    steps: tuple[int, ...] = (900, 500)
    learning_rates: tuple[float, ...] = (1e-3, 8e-4)
    batch: int = 32
    caption_weight: float = 0.5


def pixels(images: NDArray[np.uint8]) -> torch.Tensor:
    """Convert images [B, S, S, 3] to the tower's input [B, 3, S, S], as the image processor does."""
    scaled = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - 0.5) / 0.25


def coverage(thing: Thing) -> NDArray[np.int64]:
    """Return the number of pixels of the thing's box in each patch, row by row, [N]."""
    edges = np.arange(_SIDE) * PATCH
    left, top, right, bottom = thing.box
    across = np.clip(np.minimum(edges + PATCH, right) - np.maximum(edges, left), 0, None)
    down = np.clip(np.minimum(edges + PATCH, bottom) - np.maximum(edges, top), 0, None)
    return np.outer(down, across).reshape(-1)


def _labels(scenes: Sequence[Sequence[Thing]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels of patches [B, 4, N] (category, value, colour, place; -100: none) and facts [B, 12]."""
    dense = np.full((len(scenes), len(_DENSE), _SIDE**2), _IGNORE, dtype=np.int64)
    dense[:, 0] = 0
    facts = np.zeros((len(scenes), len(_FACTS)), dtype=np.int64)
    for row, things in enumerate(scenes):
        for index, thing in enumerate(things):
            value = VALUES[thing.category].index(thing.value)
            color, place = list(COLORS).index(thing.color), _PLACES.index(thing.place)
            cover = coverage(thing)
            dense[row, 0, cover > 0] = _IGNORE  # partly covered: neither the thing nor background
            known = (index + 1, _FIRST_VALUE[thing.category] + value, color, place)
            dense[row][:, cover >= _COVERED] = np.array(known)[:, None]
            facts[row, 3 * index : 3 * index + 3] = (value, color, place)
    return torch.from_numpy(dense), torch.from_numpy(facts)


def _grid_positions(width: int) -> torch.Tensor:
    """Return sines and cosines of row and column, [N, width].

    With these as initial position embeddings, the tower soon learns which patches are neighbours.
    """
    periods = np.geomspace(2.5, 4 * _SIDE, width // 4)
    rows, columns = np.mgrid[:_SIDE, :_SIDE].reshape(2, -1, 1)
    angles = [2 * np.pi * axis / periods for axis in (rows, columns)]
    return torch.from_numpy(np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)).float()


def train_tower(
    tower: CLIPVisionModel,
    images: NDArray[np.uint8],
    scenes: Sequence[Sequence[Thing]],
    settings: TowerSettings,
    rng: np.random.Generator,
    report: Callable[[int, str], None],
) -> None:
    """Train `tower` in place.

    Args:
        tower: A CLIP vision tower with fresh weights.
        images: Training images, [images, S, S, 3].
        scenes: The things in each image.
        settings: The settings of the training.
        rng: Draws the batches.
        report: Called every 100 steps with the step and the state of the training.
    """
    width = tower.config.hidden_size
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = 0.3 * _grid_positions(width)
    dense_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(_DENSE)))
    caption_head = nn.Linear(width, sum(_FACTS))
    module = nn.ModuleList([tower, dense_head, caption_head])
    tower.train()
    for cycle, (steps, peak) in enumerate(zip(settings.steps, settings.learning_rates, strict=True), start=1):
        optimizer = torch.optim.AdamW(module.parameters(), lr=peak, weight_decay=0.05, betas=(0.9, 0.98))

        def rate(step: int, steps: int = steps) -> float:
            return min(1.0, (step + 1) / 60) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        seen: list[list[float]] = []
        started = time.perf_counter()
        for step in range(1, steps + 1):
            picked = rng.choice(len(images), settings.batch, replace=False)
            dense, facts = _labels([scenes[i] for i in picked])
            output = tower(pixels(images[picked]), output_hidden_states=True)
            told = dense_head(output.hidden_states[-2][:, 1:]).split(_DENSE, dim=2)
            patch_losses = [
                functional.cross_entropy(guess.flatten(0, 1), label.flatten())
                for guess, label in zip(told, dense.unbind(1), strict=True)
            ]
            captions = caption_head(output.pooler_output).split(_FACTS, dim=1)
            fact_losses = [
                functional.cross_entropy(guess, label)
                for guess, label in zip(captions, facts.unbind(1), strict=True)
            ]
            loss = torch.stack(patch_losses).sum() + settings.caption_weight * torch.stack(fact_losses).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            labelled = dense[:, 1] != _IGNORE
            named = (told[1].argmax(2) == dense[:, 1])[labelled].float().mean()
            known = [
                (c.argmax(1) == f).float().mean() for c, f in zip(captions, facts.unbind(1), strict=True)
            ]
            seen.append([loss.item(), named.item(), torch.stack(known).mean().item()])
            if step % 100 == 0 or step == steps:
                total, patches, told_right = np.mean(seen, axis=0)
                seconds = (time.perf_counter() - started) / step
                report(
                    step,
                    f"(cycle {cycle}) loss {total:.3f}, patches that name their thing {patches:.3f}, "
                    f"facts told by CLS {told_right:.3f}, {seconds:.2f} s a step",
                )
                seen.clear()


@torch.no_grad()
def encode_images(tower: CLIPVisionModel, images: NDArray[np.uint8], batch: int = 64) -> NDArray[np.float16]:
    """Run the tower as LLaVA does, once for each image.

    Args:
        tower: The vision tower.
        images: [images, S, S, 3].
        batch: Number of images in a pass.

    Returns:
        The features: hidden_states[-2] without CLS, [images, N, Dv].
    """
    tower.eval()
    features = []
    for start in range(0, len(images), batch):
        output = tower(pixels(images[start : start + batch]), output_hidden_states=True)
        features.append(output.hidden_states[-2][:, 1:].to(torch.float16).numpy())
    return np.concatenate(features)
