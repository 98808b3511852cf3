"""Exact match of the demo model by pruning method and kept ratio: `python -m visprune.demo.evaluate`.

Held-out scenes, one question each, greedy answers. The tower runs once for an image; a method only chooses
which of its features the language model gets to see.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from visprune.budget import Budget
from visprune.demo import MODEL_DIR
from visprune.demo.language import answered
from visprune.demo.scenes import Question, draw, questions
from visprune.demo.tower import coverage, encode_images
from visprune.pruning.base import Layout
from visprune.registry import load_method

__all__ = ["METHODS", "RATIOS", "HeldOut", "evaluate", "hold_out", "kind", "main", "wilson"]

RATIOS = (0.5, 0.25, 0.11, 0.05)

# The training log looks at the scenes from 0 on, so the table does not.
_FIRST_TEST_SCENE = 500_000

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out images as the tower sees them, and one question about each.

    Attributes:
        features: [B, N, Dv].
        received: Attention received by each patch in the feature layer, [B, N].
        asked: One question for each image.
    """

    features: torch.Tensor
    received: NDArray[np.float32]
    asked: list[Question]

    @property
    def tokens(self) -> int:
        """Visual tokens of an image before pruning, N."""
        return int(self.received.shape[1])


Method: TypeAlias = Callable[[HeldOut, float, np.random.Generator], Indices]


def _of_the_product(name: str) -> Method:
    """A registered method as it is exported, fed with the signal that FoPru reads."""
    pruner = load_method(name)()

    def select(data: HeldOut, ratio: float, rng: np.random.Generator) -> Indices:
        side = math.isqrt(data.tokens)
        layout = Layout(data.tokens, (side, side))
        keep = pruner.budget(layout).from_ratio(ratio)
        signals = {"attention_received": torch.from_numpy(data.received)}
        indices: Indices = pruner.select(data.features, signals, keep, layout).numpy()
        return indices

    return select


def _kept(data: HeldOut, ratio: float) -> int:
    return Budget(data.tokens).from_ratio(ratio)


def _random(data: HeldOut, ratio: float, rng: np.random.Generator) -> Indices:
    """A new draw for each image; an exported `random` repeats one."""
    return rng.random(data.received.shape).argsort(axis=1)[:, : _kept(data, ratio)]


def _least_attended(data: HeldOut, ratio: float, rng: np.random.Generator) -> Indices:
    return np.argsort(data.received, axis=1, kind="stable")[:, : _kept(data, ratio)]


def _oracle(data: HeldOut, ratio: float, rng: np.random.Generator) -> Indices:
    """Patches by how much of the box asked about they hold, then by how near they are to it."""
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
    "fopru-rank": _of_the_product("fopru-rank"),
    "fopru-row": _of_the_product("fopru-row"),
    "random": _random,
    "uniform": _of_the_product("uniform"),
    "least attended (control)": _least_attended,
    "oracle (knows the question's box)": _oracle,
}
"""Name -> which patches to keep, [B, K] in any order."""


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95% by default."""
    p = right / of
    centre = p + z * z / (2 * of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return (centre - half) / (1 + z * z / of), (centre + half) / (1 + z * z / of)


def kind(question: Question) -> str:
    """What a question asks for: "color", "place", or the category whose value it wants."""
    if question.answer == question.thing.color:
        return "color"
    return "place" if question.answer == question.thing.place else question.thing.category


def hold_out(model: LlavaForConditionalGeneration, count: int, first: int = 0) -> HeldOut:
    """The scenes of `count` seeds from `first` on, below those of training, with one question each."""
    images, things = draw(range(first, first + count))
    rng = np.random.default_rng(first)
    asked = [questions(t, rng)[0] for t in things]
    features, received = encode_images(model.model.vision_tower, images)
    return HeldOut(torch.from_numpy(features), received, asked)


def _pruned(data: HeldOut, method: str, ratio: float, rng: np.random.Generator) -> torch.Tensor:
    """The features that a method keeps, [B, K, Dv], in ascending order of their patches."""
    keep = np.sort(METHODS[method](data, ratio, rng), axis=1)
    index = torch.from_numpy(keep)[..., None].expand(-1, -1, data.features.shape[2])
    return data.features.gather(1, index)


def summary(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    data: HeldOut,
    ratio: float = 0.11,
) -> str:
    """One line for a training log: exact match unpruned and at one ratio."""
    rng = np.random.default_rng(0)
    parts = [f"unpruned {answered(model, tokenizer, data.features, data.asked).mean():.3f}"]
    for method in METHODS:
        right = answered(model, tokenizer, _pruned(data, method, ratio, rng), data.asked)
        parts.append(f"{method.split(' (')[0]} {right.mean():.3f}")
    return f"{', '.join(parts)} (ratio {ratio})"


def evaluate(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, data: HeldOut, seed: int = 0
) -> dict[str, dict[str, object]]:
    """Exact match of every method at every ratio.

    Returns:
        "method ratio" -> the method, ratio, tokens kept, right answers, and accuracy by kind of question.
    """
    rng = np.random.default_rng(seed)
    kinds = np.array([kind(q) for q in data.asked])
    results: dict[str, dict[str, object]] = {}

    def add(method: str, ratio: float, features: torch.Tensor) -> None:
        right = answered(model, tokenizer, features, data.asked)
        by_kind = {str(k): round(float(right[kinds == k].mean()), 3) for k in np.unique(kinds)}
        results[f"{method} {ratio}"] = {
            "method": method,
            "ratio": ratio,
            "kept": features.shape[1],
            "right": int(right.sum()),
            "of": len(right),
            "by_kind": by_kind,
        }

    add("none", 1.0, data.features)
    for method in METHODS:
        for ratio in RATIOS:
            add(method, ratio, _pruned(data, method, ratio, rng))
    return results


def table(results: dict[str, dict[str, object]]) -> str:
    """The results in Markdown: a row for each method, a column for each ratio."""

    def cell(result: dict[str, object]) -> str:
        right, of = int(str(result["right"])), int(str(result["of"]))
        low, high = wilson(right, of)
        return f"{right / of:.3f} ({low:.3f} to {high:.3f})"

    lines = [
        "| method | " + " | ".join(f"ratio {r:g}" for r in RATIOS) + " |",
        "|---" * (len(RATIOS) + 1) + "|",
    ]
    for method in METHODS:
        cells = [results[f"{method} {ratio}"] for ratio in RATIOS]
        lines.append(f"| {method} | " + " | ".join(f"{cell(c)}, {c['kept']} tokens" for c in cells) + " |")
    none = results["none 1.0"]
    lines += ["", f"Unpruned, {none['kept']} tokens (ratio 1.0): {cell(none)}, {none['of']} questions."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="Markdown file to write; the numbers go to .json beside it")
    options = parser.parse_args(arguments)
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    results = evaluate(model, tokenizer, hold_out(model, options.questions, _FIRST_TEST_SCENE))
    text = table(results)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
