"""Exact match of the demo model by pruning method and kept ratio: `python -m visprune.demo.evaluate`.

Held-out scenes are asked one question each, and answers are greedy. The vision tower runs once for each
image; a method before the LLM only chooses which features the language model sees. Methods inside the LLM are
measured by `evaluate_inside.py`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from visprune.budget import Budget
from visprune.demo import MODEL_DIR
from visprune.demo.evaluate_inside import Result, evaluate_inside
from visprune.demo.held_out import FIRST_TEST_SCENE, held_out, wilson
from visprune.demo.language import answered
from visprune.demo.scenes import SceneQuestion
from visprune.demo.tower import coverage, pixels
from visprune.export.graph import attention
from visprune.export.graph.graphs import VisionEncoder
from visprune.export.models import clip_vision_model, llava
from visprune.pruning.base import Layout, VisionPruner
from visprune.pruning.registry import load_method
from visprune.work import LayerWork

__all__ = ["METHODS", "RATIOS", "HeldOut", "encode", "evaluate", "hold_out", "main", "summary"]

RATIOS = (0.5, 0.25, 0.11)

Indices = NDArray[np.int64]


_BATCH = 50


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out images, the outputs of the vision tower for them, and one question about each.

    Attributes:
        images: [B, S, S, 3].
        features: Features of the tower, [B, N, Dv].
        projected: The same tokens after the projector, [B, N, D].
        signals: The signals of the tower's attention that the methods read, [B, N] or [B, N, N] each.
        asked: One question about each image.
    """

    images: NDArray[np.uint8]
    features: torch.Tensor
    projected: torch.Tensor
    signals: dict[str, torch.Tensor]
    asked: list[SceneQuestion]

    @property
    def tokens(self) -> int:
        """Visual tokens of an image before pruning, N."""
        return int(self.features.shape[1])


Method: TypeAlias = Callable[[HeldOut, float, np.random.Generator], Indices]

_BEFORE = ("fopru-rank", "fopru-row", "fastervlm", "vispruner", "divprune", "freepruner", "uniform")


def _pruner(name: str) -> VisionPruner:
    return cast(VisionPruner, load_method(name)())


def _registered(name: str) -> Method:
    """Return a registered method, with the functions that are exported."""

    def select(data: HeldOut, ratio: float, rng: np.random.Generator) -> Indices:
        pruner = _pruner(name)
        side = math.isqrt(data.tokens)
        layout = Layout(data.tokens, (side, side))
        keep = pruner.budget(layout).from_ratio(ratio)
        tokens = data.projected if getattr(pruner, "projected", False) else data.features
        parts = []
        for start in range(0, len(tokens), _BATCH):
            part = slice(start, start + _BATCH)
            constants = {n: torch.from_numpy(a) for n, a in pruner.constants(layout).items()}
            known = {n: data.signals[n][part] for n in pruner.signals} | constants
            parts.append(cast(torch.Tensor, pruner.select(tokens[part], known, keep, layout)))
        indices: Indices = torch.cat(parts).numpy()
        return indices

    return select


def _kept(data: HeldOut, ratio: float) -> int:
    return Budget(data.tokens).from_ratio(ratio)


def _random(data: HeldOut, ratio: float, rng: np.random.Generator) -> Indices:
    """Keep random patches, drawn anew for each image; an exported `random` repeats one draw."""
    shape = (len(data.asked), data.tokens)
    return rng.random(shape).argsort(axis=1)[:, : _kept(data, ratio)]


def _least_attended(data: HeldOut, ratio: float, rng: np.random.Generator) -> Indices:
    received = data.signals["attention_received"].numpy()
    return np.argsort(received, axis=1, kind="stable")[:, : _kept(data, ratio)]


def _oracle(data: HeldOut, ratio: float, rng: np.random.Generator) -> Indices:
    """Keep the patches with the most pixels of the box that the question is about, then the nearest to it."""
    side = math.isqrt(data.tokens)
    rows, columns = np.mgrid[:side, :side].reshape(2, -1) + 0.5
    orders = []
    for question in data.asked:
        cover = coverage(question.thing)
        weight = cover / cover.sum()
        distance = np.hypot(rows - (weight * rows).sum(), columns - (weight * columns).sum())
        orders.append(np.lexsort((distance, -cover))[: _kept(data, ratio)])
    return np.stack(orders)


METHODS: dict[str, Method] = {
    **{name: _registered(name) for name in _BEFORE},
    "random": _random,
    "least attended (control)": _least_attended,
    "oracle (knows the question's box)": _oracle,
}
"""Name -> function that returns the patches to keep before the LLM, [B, K] in any order."""


@torch.no_grad()
def encode(
    model: LlavaForConditionalGeneration, images: NDArray[np.uint8]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Run the tower and the projector on images [B, S, S, 3].

    Returns:
        Features, projected features and signals, as in `HeldOut`.
    """
    attention.register()
    names = sorted({name for method in _BEFORE for name in _pruner(method).signals})
    parts, tower = llava.parts(model), model.model.vision_tower
    encoder = VisionEncoder(parts, clip_vision_model, llava.features(model.config), names).eval()
    before = tower.config._attn_implementation
    tower.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
    batches = [encoder(pixels(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)]
    tower.set_attn_implementation(before)
    features, *signals = (torch.cat(column) for column in zip(*batches, strict=True))
    projected = torch.cat([parts.projector(part) for part in features.split(_BATCH)])
    return features, projected, dict(zip(names, signals, strict=True))


def hold_out(model: LlavaForConditionalGeneration, count: int, first: int = 0) -> HeldOut:
    """Return the images and questions of `held_out`, with the outputs of the tower."""
    images, asked = held_out(count, first)
    return HeldOut(images, *encode(model, images), asked)


def _pruned(data: HeldOut, method: str, ratio: float, rng: np.random.Generator) -> torch.Tensor:
    """Return the features that a method keeps, [B, K, Dv], in ascending order of their patches."""
    keep = np.sort(METHODS[method](data, ratio, rng), axis=1)
    index = torch.from_numpy(keep)[..., None].expand(-1, -1, data.features.shape[2])
    return data.features.gather(1, index)


def summary(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    data: HeldOut,
    ratio: float = 0.11,
) -> str:
    """Return a line for the training log: exact match unpruned, and of each method at one ratio."""
    rng = np.random.default_rng(0)
    parts = [f"unpruned {answered(model, tokenizer, data.features, data.asked).mean():.3f}"]
    for method in METHODS:
        right = answered(model, tokenizer, _pruned(data, method, ratio, rng), data.asked)
        parts.append(f"{method.split(' (')[0]} {right.mean():.3f}")
    return f"{', '.join(parts)} (ratio {ratio})"


def evaluate(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    data: HeldOut,
    checkpoint: Path = MODEL_DIR,
) -> list[Result]:
    """Measure every method at every ratio; methods inside the LLM run as exported bundles."""
    rng = np.random.default_rng(0)
    text: Any = model.config.text_config
    work = LayerWork(text.hidden_size, text.intermediate_size)
    results = []
    for method, ratio in [("none", 1.0), *((m, r) for m in METHODS for r in RATIOS)]:
        features = data.features if method == "none" else _pruned(data, method, ratio, rng)
        right = answered(model, tokenizer, features, data.asked)
        kept = features.shape[1]
        share = work.layer(kept) / work.layer(data.tokens)
        results.append(Result(method, ratio, f"{kept}", share, int(right.sum()), len(right)))
    return results + evaluate_inside(checkpoint, data.images, data.asked, RATIOS)


def table(results: Sequence[Result]) -> str:
    """Return the results in Markdown, with a row for each method and a column for each ratio."""
    found = {(result.method, result.ratio): result for result in results}

    def cell(result: Result | None) -> str:
        if result is None:
            return "cannot be reached"
        low, high = wilson(result.right, result.of)
        exact = f"{result.right / result.of:.3f} ({low:.3f} to {high:.3f})"
        return f"{exact}; {result.kept}; {100 * result.work:.0f}%"

    lines = [
        "| method | " + " | ".join(f"ratio {r:g}" for r in RATIOS) + " |",
        "|---" * (len(RATIOS) + 1) + "|",
    ]
    for method in dict.fromkeys(result.method for result in results if result.method != "none"):
        cells = [found.get((method, ratio)) for ratio in RATIOS]
        lines.append(f"| {method} | " + " | ".join(map(cell, cells)) + " |")
    none = found["none", 1.0]
    lines += ["", f"Unpruned: {cell(none)}; {none.of} questions."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument(
        "--out", type=Path, help="Markdown file to write; the numbers go to a .json of the same name"
    )
    options = parser.parse_args(arguments)
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = hold_out(model, options.questions, FIRST_TEST_SCENE)
    results = evaluate(model, tokenizer, data, options.model)
    text = table(results)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
        options.out.with_suffix(".json").write_text(
            json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
