"""The methods of the demo's table that run as exported bundles, in the runtime that users run.

These are the methods inside the LLM, one composition of two methods, and the methods that make the image
smaller before the vision tower.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from visprune.bundle import Bundle
from visprune.demo.answers import ANSWER_TOKENS
from visprune.demo.result import Result
from visprune.errors import UnsupportedError
from visprune.estimate.flops import savings
from visprune.evaluation.answering import AnswerJob, AnswerSettings, Candidate, identity
from visprune.evaluation.metrics import exact_match
from visprune.evaluation.questions import Questions
from visprune.evaluation.workers import Workers, open_workers
from visprune.export import export
from visprune.pruning.registry import BUILTIN, load_method
from visprune.runtime import load
from visprune.work import LayerWork

__all__ = ["evaluate_bundles"]


def evaluate_bundles(
    checkpoint: Path, questions: Questions, counts: Sequence[int], tokens: int, work: LayerWork
) -> Iterator[Result]:
    """Measure every such method at the ratio that belongs to each count.

    For a method inside the LLM the ratio is the share of tokens left in the end; for fitprune it is the share
    of the visual work that is left if that count of tokens enters the LLM. In the composition it is the ratio
    of the first method, and fastv then keeps half. A ratio that no recipe reaches has no result.

    Args:
        checkpoint: Directory of the demo model.
        questions: The questions, with their images.
        counts: The counts of tokens.
        tokens: Visual tokens of an image before pruning.
        work: The work of a decoder layer.
    """
    for name, options in _rows().items():
        for count in counts:
            by_work = name == "fitprune"
            ratio = work.layer(count) / work.layer(tokens) if by_work else count / tokens
            try:
                yield _run(checkpoint, name, count, options | {"ratio": ratio}, questions)
            except UnsupportedError as error:
                print(f"{name}, {count} tokens: {error.what}")


def _rows() -> dict[str, dict[str, Any]]:
    """Return the options of the export by name in the table."""
    places = {name: load_method(name).place for name in sorted(BUILTIN)}
    rows: dict[str, dict[str, Any]] = {
        name: {"method": name} for name, place in places.items() if place != "before the LLM"
    }
    return rows | {"fopru-rank, then fastv": {"method": "fopru-rank", "then": "fastv:0.5"}}


def _run(checkpoint: Path, name: str, count: int, options: dict[str, Any], questions: Questions) -> Result:
    """Export a bundle with these options, ask it, and judge the answers."""
    started = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = export(checkpoint, output=folder / "bundle", verify=False, **options)
        found = savings(bundle.manifest)
        work = found.visual.pruned / found.visual.unpruned if found else float("nan")
        kept = _tokens_of_layers(bundle, questions)
        candidate = Candidate(bundle.path)
        settings = AnswerSettings(ANSWER_TOKENS)
        job = AnswerJob(candidate, identity(bundle, candidate), questions.instruction, settings)
        size = sum(file.size for file in bundle.manifest.files.values())
        ask = stack.enter_context(open_workers(Workers(), [job], len(questions.usable), size))
        texts = {answer.key: answer.text for answer in ask(job, questions.usable)}
    right = tuple(exact_match(texts[question.key], question.answers) for question in questions.usable)
    return Result(name, count, kept, work, right, time.perf_counter() - started)


def _tokens_of_layers(bundle: Bundle, questions: Questions) -> str:
    """Return the visual tokens that enter each layer, or one number if it is the same for all."""
    question = questions.usable[0]
    with load(bundle.path) as pipeline:
        answer = pipeline.generate(question.image, question.text, max_new_tokens=1)
    layers = answer.layer_tokens
    return " > ".join(map(str, layers)) if len(set(layers)) > 1 else str(answer.tokens_kept)
