"""The methods of the demo's table that run in PyTorch: which tokens each leaves of every image.

All registered methods before the LLM are here without being named, `none` and `random` excepted; beside them
stand a second reading of freePruner, a random choice for each image, a control and an oracle. A method that
makes the image smaller before the vision tower is not here: `table_bundles` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from visprune.demo.scenes import SceneQuestion
from visprune.demo.tower import coverage
from visprune.pruning.base import Layout, Merged, Traits, VisionPruner
from visprune.pruning.freepruner import FreePruner
from visprune.pruning.registry import BUILTIN, load_method

__all__ = ["CONTROL", "METHODS", "ORACLE", "PRUNERS", "Chosen", "HeldOut"]

CONTROL = "least attended (control)"
ORACLE = "oracle (knows the question's box)"

_BATCH = 50


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out images, the outputs of the vision tower for them, and one question about each.

    Attributes:
        images: [B, S, S, 3].
        features: Features of the tower, [B, N, Dv].
        projected: The same tokens after the projector, [B, N, D].
        signals: The signals that the methods read, [B, ...] each.
        layout: Meaning of the N tokens.
        asked: One question about each image.
        question_embeds: The LLM's embeddings of the tokens of each text that is asked, [S, D].
    """

    images: NDArray[np.uint8]
    features: torch.Tensor
    projected: torch.Tensor
    signals: dict[str, torch.Tensor]
    layout: Layout
    asked: list[SceneQuestion]
    question_embeds: dict[str, torch.Tensor]

    @property
    def tokens(self) -> int:
        """Visual tokens of an image before pruning, N."""
        return self.layout.visual_tokens


class Chosen(NamedTuple):
    """The tokens that a method leaves of each image.

    Attributes:
        features: [B, K, Dv], in the order in which the LLM gets them.
        indices: [B, K] int64, the patch that each stands for; -1 for the CLS token.
        weights: [B, K, N], the weight of each patch in each token; None if nothing is merged.
    """

    features: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor | None = None


Method: TypeAlias = Callable[[HeldOut, int, np.random.Generator], Chosen]


def _pruners() -> dict[str, VisionPruner]:
    classes: dict[str, Any] = {name: load_method(name) for name in sorted(BUILTIN)}
    before: dict[str, VisionPruner] = {
        name: method()
        for name, method in classes.items()
        if method.place == "before the LLM" and name not in ("none", "random")
    }
    return before | {"freepruner, first reading": FreePruner(layers="feature", complement="third")}


PRUNERS = dict(sorted(_pruners().items()))
"""Name in the table -> method with its knobs."""


def _with(pruner: VisionPruner) -> Method:
    """Return a method as a function, which calls what is exported."""

    def choose(data: HeldOut, count: int, rng: np.random.Generator) -> Chosen:
        keep = pruner.budget(data.layout).at_most(count)
        traits = Traits.of(pruner)
        tokens = data.projected if traits.projected else data.features
        constants = {name: torch.from_numpy(array) for name, array in pruner.constants(data.layout).items()}
        order, parts = [], []
        for images, text in _batches(data, by_question=traits.needs_text):
            known = {name: data.signals[name][images] for name in pruner.signals} | constants
            if text is not None:
                known["question_embeds"] = data.question_embeds[text]
            found = pruner.select(tokens[images], known, keep, data.layout)
            if isinstance(found, Merged):
                parts.append(Chosen(*found))
            else:
                parts.append(Chosen(_gathered(data.features[images], found), found))
            order.append(images)
        back = torch.from_numpy(np.concatenate(order).argsort())
        features = torch.cat([part.features for part in parts])[back]
        indices = torch.cat([part.indices for part in parts])[back]
        weights = [part.weights for part in parts if part.weights is not None]
        return Chosen(features, indices, torch.cat(weights)[back] if weights else None)

    return choose


def _batches(data: HeldOut, *, by_question: bool) -> Iterator[tuple[NDArray[np.int64], str | None]]:
    """Yield the numbers of the images of each batch, and their question if all of them must have the same."""
    texts = np.array([question.text for question in data.asked])
    for text in np.unique(texts) if by_question else [None]:
        images = np.arange(len(texts)) if text is None else np.flatnonzero(texts == text)
        for start in range(0, len(images), _BATCH):
            yield images[start : start + _BATCH], None if text is None else str(text)


def _gathered(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the kept features: [B, N, Dv] and [B, K] -> [B, K, Dv]."""
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[2]))


def _chosen(data: HeldOut, indices: NDArray[np.int64]) -> Chosen:
    """Return single patches, given in any order, in reading order."""
    kept = torch.from_numpy(np.sort(indices, axis=1))
    return Chosen(_gathered(data.features, kept), kept)


def _random(data: HeldOut, count: int, rng: np.random.Generator) -> Chosen:
    """Keep random patches, drawn anew for each image; an exported `random` repeats one draw."""
    return _chosen(data, rng.random((len(data.asked), data.tokens)).argsort(axis=1)[:, :count])


def _least_attended(data: HeldOut, count: int, rng: np.random.Generator) -> Chosen:
    received = data.signals["attention_received"].numpy()
    return _chosen(data, np.argsort(received, axis=1, kind="stable")[:, :count])


def _oracle(data: HeldOut, count: int, rng: np.random.Generator) -> Chosen:
    """Keep the patches with the most pixels of the box that the question is about, then the nearest to it."""
    side = math.isqrt(data.tokens)
    rows, columns = np.mgrid[:side, :side].reshape(2, -1) + 0.5
    orders = []
    for question in data.asked:
        cover = coverage(question.thing)
        weight = cover / cover.sum()
        distance = np.hypot(rows - (weight * rows).sum(), columns - (weight * columns).sum())
        orders.append(np.lexsort((distance, -cover))[:count])
    return _chosen(data, np.stack(orders))


METHODS: dict[str, Method] = {
    **{name: _with(pruner) for name, pruner in PRUNERS.items()},
    "random": _random,
    CONTROL: _least_attended,
    ORACLE: _oracle,
}
"""Name in the table -> function that leaves at most `count` tokens of each image."""
