"""Exact match of the demo model by pruning method and count: `python -m visprune.demo.evaluate`.

Held-out scenes are asked one question each, and answers are greedy. For the methods before the LLM the vision
tower runs once for each image, and a method only chooses what the language model sees (`table_methods.py`).
The other methods run as exported bundles (`table_bundles.py`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from visprune.demo import MODEL_DIR
from visprune.demo.held_out import FIRST_TEST_SCENE, held_out, held_out_questions
from visprune.demo.language import answered
from visprune.demo.result import Result, loss_lines, losses, table
from visprune.demo.scenes import SceneQuestion
from visprune.demo.table_bundles import evaluate_bundles
from visprune.demo.table_methods import METHODS, PRUNERS, HeldOut
from visprune.demo.tower import pixels
from visprune.export.graph import attention
from visprune.export.graph.graphs import VisionEncoder
from visprune.export.models import clip_vision_model, llava
from visprune.work import LayerWork

__all__ = ["COUNTS", "evaluate", "hold_out", "look", "main", "summary"]

COUNTS = (64, 36, 16)
"""Counts of the table's columns. They are squares, because some methods keep a square grid of tokens."""

_BATCH = 50


@torch.no_grad()
def look(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    images: NDArray[np.uint8],
    asked: list[SceneQuestion],
) -> HeldOut:
    """Run the tower and the projector on images [B, S, S, 3], and embed the questions, one for each image."""
    attention.register()
    names = sorted({name for pruner in PRUNERS.values() for name in pruner.signals})
    parts, tower, features = llava.parts(model), model.model.vision_tower, llava.features(model.config)
    encoder = VisionEncoder(parts, clip_vision_model, features, names).eval()
    before = tower.config._attn_implementation
    tower.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
    batches = [encoder(pixels(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)]
    tower.set_attn_implementation(before)
    tokens, *signals = (torch.cat(column) for column in zip(*batches, strict=True))
    projected = torch.cat([parts.projector(part) for part in tokens.split(_BATCH)])
    embed = model.get_input_embeddings()
    embeds = {
        text: embed(torch.tensor(tokenizer.encode(text, add_special_tokens=False)))
        for text in {question.text for question in asked}
    }
    known = dict(zip(names, signals, strict=True))
    return HeldOut(images, tokens, projected, known, features.layout, asked, embeds)


def hold_out(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, count: int, first: int = 0
) -> HeldOut:
    """Return the images and questions of `held_out`, with the outputs of the tower."""
    return look(model, tokenizer, *held_out(count, first))


@torch.no_grad()
def summary(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    data: HeldOut,
    count: int = COUNTS[-1],
) -> str:
    """Return a line for the training log: exact match unpruned, and of each method at one count."""
    rng = np.random.default_rng(0)
    parts = [f"unpruned {answered(model, tokenizer, data.features, data.asked).mean():.3f}"]
    for name, method in METHODS.items():
        right = answered(model, tokenizer, method(data, count, rng).features, data.asked)
        parts.append(f"{name.split(' (')[0]} {right.mean():.3f}")
    return f"{', '.join(parts)} ({count} tokens)"


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, data: HeldOut
) -> Iterator[Result]:
    """Measure the unpruned model, and every method that runs in PyTorch at every count."""
    rng = np.random.default_rng(0)
    work = _work(model)
    for name, count in [("none", data.tokens), *((name, count) for name in METHODS for count in COUNTS)]:
        started = time.perf_counter()
        features = data.features if name == "none" else METHODS[name](data, count, rng).features
        right = answered(model, tokenizer, features, data.asked)
        kept = features.shape[1]
        share = work.layer(kept) / work.layer(data.tokens)
        seconds = time.perf_counter() - started
        yield Result(name, count, f"{kept}", share, tuple(right.tolist()), seconds)


def _work(model: LlavaForConditionalGeneration) -> LayerWork:
    text: Any = model.config.text_config
    return LayerWork(text.hidden_size, text.intermediate_size)


def _record(results: Sequence[Result]) -> dict[str, Any]:
    """Return what the JSON file holds; the answers to the questions are a text of 0 and 1."""
    rows = [
        asdict(one)
        | {"right": sum(one.right), "of": len(one.right), "answers": "".join(map(str, map(int, one.right)))}
        for one in results
    ]
    return {"results": rows, "losses": [asdict(loss) for loss in losses(results)]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and write the table, and below it where a method loses to a baseline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument(
        "--out", type=Path, help="Markdown file to write; the numbers go to a .json of the same name"
    )
    options = parser.parse_args(arguments)
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = hold_out(model, tokenizer, options.questions, FIRST_TEST_SCENE)
    bundles = evaluate_bundles(
        options.model, held_out_questions(options.questions), COUNTS, data.tokens, _work(model)
    )
    results = []
    for measured in (evaluate(model, tokenizer, data), bundles):
        for one in measured:
            results.append(one)
            print(f"{one.method}, {one.count} tokens: {one.seconds:.0f} s", flush=True)
    text = f"{table(results)}\n{loss_lines(results)}"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
        options.out.with_suffix(".json").write_text(
            json.dumps(_record(results), indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
