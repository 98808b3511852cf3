"""Exact match of rows on the demo's held-out questions, for a sweep: several processes, a thread each.

Answers are those of the runtime, greedy, with the tokens that the row keeps; what was counted once is kept in
a file and not asked again.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from visprune.bench.lineup import Entry
from visprune.bench.report.report import Accuracy
from visprune.cores import usable_cores
from visprune.errors import VispruneError
from visprune.outputs import write_file
from visprune.progress import Progress
from visprune.records import from_json
from visprune.runtime.pipeline import Pipeline, load

if TYPE_CHECKING:
    from visprune.demo.scenes import SceneQuestion

__all__ = ["QUESTIONS", "demo_accuracy"]

QUESTIONS = 500
"""Of the demo's held-out set, the first ones; 95% intervals are then at most 4.4 points to each side."""

_ANSWER_TOKENS = 8
_PART = 50  # questions that a process is given at a time


def demo_accuracy(
    entries: Sequence[Entry],
    folder: Path,
    progress: Progress,
    questions: int = QUESTIONS,
    system: str | None = None,
) -> dict[str, Accuracy]:
    """Exact match of rows of the demo model, by their names.

    Args:
        entries: The rows.
        folder: Where counts are kept, a file a row.
        progress: Called as it goes on.
        questions: How many.
        system: A system prompt before each.
    """
    about = f"the first {questions} held-out questions of the demo model, exact match"
    about += "" if system is None else f", after the system prompt “{system}”"
    files = {one.contender.name: folder / f"{one.contender.name.replace(' ', '_')}.json" for one in entries}
    stamps = {one.contender.name: _stamp(one, questions, system) for one in entries}
    known = {name: _read(file, stamps[name]) for name, file in files.items()}
    found = {name: count for name, count in known.items() if count is not None}
    missing = [one for one in entries if one.contender.name not in found]
    if not missing:
        return found
    from visprune.demo.held_out import held_out

    images, asked = held_out(questions)
    starts = range(0, questions, _PART)
    total, done = len(missing) * questions, 0
    progress("asking the held-out questions", 0, total)
    # Threads of a graph do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        usable_cores(),
        mp_context=context,
        initializer=signal.signal,  # Ctrl-C is for the command, which ends these itself
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        try:
            for one in missing:
                parts = [
                    pool.submit(_right, one, images[i : i + _PART], asked[i : i + _PART], system)
                    for i in starts
                ]
                right = 0
                for part in as_completed(parts):
                    right += part.result()
                    done += questions // len(parts)
                    progress("asking the held-out questions", done, total)
                name = one.contender.name
                found[name] = _accuracy(right, questions, about)
                text = json.dumps({"stamp": stamps[name], "accuracy": asdict(found[name])})
                write_file(files[name], text + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress("asking the held-out questions", total, total)
    return found


def _accuracy(right: int, of: int, about: str) -> Accuracy:
    from visprune.demo.held_out import wilson

    return Accuracy(right, of, *wilson(right, of), about)


def _stamp(one: Entry, questions: int, system: str | None) -> dict[str, object]:
    """What an earlier count must agree in: the files of the bundle, what it keeps, what was asked."""
    keep = one.keep
    hashes = {name: record.sha256 for name, record in one.manifest.files.items() if name.startswith("onnx/")}
    ratio = keep.layer_ratio
    stamp = {"graphs": hashes, "keep_tokens": keep.tokens, "layer_ratio": ratio, "questions": questions}
    return stamp if system is None else {**stamp, "system": system}


def _read(file: Path, stamp: dict[str, object]) -> Accuracy | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return from_json(Accuracy, data["accuracy"], str(file)) if data["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError, VispruneError):
        return None  # counted again


def _right(one: Entry, images: NDArray[np.uint8], asked: Sequence[SceneQuestion], system: str | None) -> int:
    """What a process does with its part: how many of some questions are answered right."""
    from PIL import Image

    from visprune.demo.answers import is_right

    pipeline, keeps = _loaded(one.contender.path), one.contender
    right = 0
    for image, question in zip(images, asked, strict=True):
        answer = pipeline.generate(
            Image.fromarray(image),
            question.text,
            max_new_tokens=_ANSWER_TOKENS,
            system=system,
            ratio=keeps.ratio,
            keep_tokens=keeps.keep_tokens,
        )
        right += is_right(answer, question)
    return right


@functools.lru_cache(maxsize=1)
def _loaded(path: str) -> Pipeline:
    return load(path, threads=1)
