"""Exact match of bundles of the demo model: `python -m visprune.demo.answers BUNDLE...`.

The scenes and questions are those of `evaluate.py`, and answers are judged as there; but a bundle goes
through the runtime that users run, image processor and chat template included. So this needs neither PyTorch
nor transformers, and tells what a change to a bundle costs: numbers of a lower precision, for instance.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.commands.terminal import bars
from visprune.demo.held_out import held_out, wilson
from visprune.demo.scenes import Question
from visprune.errors import VispruneError
from visprune.runtime import Generation, Pipeline, load
from visprune.runtime.cores import usable_cores

__all__ = ["Score", "exact_match", "generations", "is_right", "main", "score"]

_ANSWER_TOKENS = 8  # a right one has three at most, its end included
_PART = 50  # questions that a process is given at a time


@dataclass(frozen=True, slots=True)
class Score:
    """What a bundle answers.

    Attributes:
        bundle: Its directory.
        right: Questions answered right.
        same: Questions answered as by the first bundle, right or wrong.
        of: Questions.
        low: Lower end of the 95% interval of the share that is right.
        high: Its upper end.
    """

    bundle: str
    right: int
    same: int
    of: int
    low: float
    high: float


def generations(
    pipeline: Pipeline, images: NDArray[np.uint8], asked: Sequence[Question]
) -> Iterator[Generation]:
    """What a bundle answers to each question about its image [S, S, 3], greedily and one by one."""
    for image, question in zip(images, asked, strict=True):
        yield pipeline.generate(Image.fromarray(image), question.text, max_new_tokens=_ANSWER_TOKENS)


def is_right(answer: Generation, question: Question) -> bool:
    """Whether an answer is exactly the right one, and ends there."""
    return answer.finish_reason == "eos" and answer.text.strip() == question.answer


def exact_match(pipeline: Pipeline, images: NDArray[np.uint8], asked: Sequence[Question]) -> list[bool]:
    """Whether each answer is right. `held_out(count)` gives the images [B, S, S, 3] and the questions."""
    answers = generations(pipeline, images, asked)
    return [is_right(answer, question) for answer, question in zip(answers, asked, strict=True)]


def score(bundle: str, right: Sequence[bool], texts: Sequence[str], first: Sequence[str]) -> Score:
    """The figures of a bundle, from its answers and those of the first."""
    same = sum(mine == theirs for mine, theirs in zip(texts, first, strict=True))
    return Score(bundle, sum(right), same, len(right), *wilson(sum(right), len(right)))


def _answer(
    bundle: str, threads: int, images: NDArray[np.uint8], asked: Sequence[Question]
) -> list[tuple[bool, str]]:
    """What a process does with its part: whether each answer is right, and its text."""
    answers = generations(_loaded(bundle, threads), images, asked)
    return [(is_right(answer, q), answer.text) for answer, q in zip(answers, asked, strict=True)]


@functools.lru_cache(maxsize=1)
def _loaded(bundle: str, threads: int) -> Pipeline:
    return load(bundle, threads=threads)


def _run(
    bundles: Sequence[str], images: NDArray[np.uint8], asked: Sequence[Question], processes: int
) -> Iterator[Score]:
    """The scores in order, each bundle's parts answered by several processes."""
    threads = max(1, usable_cores() // processes)
    starts = range(0, len(asked), _PART)
    first: list[str] | None = None
    with ExitStack() as stack:
        update = stack.enter_context(bars())
        # Threads of a graph do not survive a fork.
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=context))
        for bundle in bundles:
            load(bundle).close()  # a bundle that cannot be loaded is told here, and files are hashed once
            parts = {
                pool.submit(_answer, bundle, threads, images[i : i + _PART], asked[i : i + _PART]): i
                for i in starts
            }
            answers: dict[int, list[tuple[bool, str]]] = {}
            for done in as_completed(parts):
                answers[parts[done]] = done.result()
                update(bundle, sum(map(len, answers.values())), len(asked))
            right, texts = zip(*(answer for i in starts for answer in answers[i]), strict=True)
            first = list(texts) if first is None else first
            yield score(bundle, right, texts, first)


def _line(result: Score) -> str:
    """A score for people."""
    interval = f"{result.right / result.of:.4f} ({result.low:.4f} to {result.high:.4f})"
    return f"{interval}  {result.same / result.of:.4f} as the first  {result.bundle}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "bundles", nargs="+", metavar="BUNDLE", help="directory of a bundle of the demo model"
    )
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if min(options.questions, options.processes) < 1:
        parser.error("--questions and --processes must be at least 1")
    images, asked = held_out(options.questions)
    results = []
    try:
        for result in _run(options.bundles, images, asked, options.processes):
            print(_line(result), flush=True)
            results.append(result)
    except VispruneError as error:
        sys.exit(f"{error.what}\n{error.hint}")
    if options.json:
        text = json.dumps([asdict(result) for result in results], indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
