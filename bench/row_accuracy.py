"""Accuracy of a report's rows: questions with known answers are asked of each, by `visprune.evaluation`.

The answers are kept in a directory, one file for each set of questions and settings, so that an interrupted
run continues, and a question that was answered once is not asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from visprune.bench.baselines import baseline_pairs
from visprune.bench.entries import Entry
from visprune.bench.report.report import Accuracy, Workload
from visprune.cores import total_memory, usable_cores
from visprune.evaluation import evaluate
from visprune.evaluation.answering import AnswerSettings, Candidate
from visprune.evaluation.evaluator import AddedRows, answers_depend_on
from visprune.evaluation.questions import Questions
from visprune.evaluation.summary import EvaluationRow, losses
from visprune.evaluation.workers import Workers
from visprune.progress import Progress

__all__ = ["row_accuracies"]


def row_accuracies(
    entries: Sequence[Entry], questions: Questions, work: Workload, folder: Path, progress: Progress
) -> tuple[list[Accuracy], list[str]]:
    """Ask every row the questions, with the tokens that the row keeps.

    Args:
        entries: The rows; all are bundles.
        questions: The questions, of which one at least is usable.
        work: The workload of the report, for its provider, threads and system prompt. Its image and its
            prompt are not asked.
        folder: Directory of the files of answers; it is made if missing.
        progress: Called after each answer.

    Returns:
        The accuracy of each row, and notes: answers that were cut off or missing, and rows that lose to
        random tokens or to a smaller picture.

    Raises:
        VispruneError: As for `visprune.evaluation.evaluate`.
    """
    settings, workers = _settings(entries, work)
    rows = [one.contender for one in entries]
    candidates = [Candidate(Path(one.path), one.ratio, one.keep_tokens, one.name) for one in rows]
    pairs = tuple(baseline_pairs(entries))
    folder.mkdir(exist_ok=True)
    bound_to = json.dumps(answers_depend_on(questions, settings), sort_keys=True)
    name = hashlib.sha256(bound_to.encode()).hexdigest()[:16]
    answered: dict[str, int] = {}

    def one_bar(candidate: str, done: int, total: int) -> None:
        answered[candidate] = done
        progress("asking questions", sum(answered.values()), total * len(entries))

    found = evaluate(
        candidates,
        questions,
        settings=settings,
        workers=workers,
        output=folder / f"{name}.jsonl",
        common=True,
        baselines=lambda *_: AddedRows(pairs=pairs),
        progress=one_bar,
    )
    about = f"{found.data}, {found.rows[0].figures[0].name}"
    about += "" if work.system is None else f", after the system prompt “{work.system}”"
    notes = _notes(found.rows, questions, settings)
    notes += found.skipped[len(questions.skipped) :]  # those that some row could not be asked
    notes += losses(found.rows)
    return [_accuracy(row, about) for row in found.rows], notes


def _settings(entries: Sequence[Entry], work: Workload) -> tuple[AnswerSettings, Workers]:
    """Return the settings of the answers, and the workers.

    On the CPU there are workers with one thread each. If half of this machine's memory does not hold a bundle
    for each core, one worker has all threads of the workload. Answers are kept by the number of threads, so
    this must not depend on the memory that is free. On a GPU there is one worker, because memory there is not
    known.
    """
    if work.provider != "cpu":
        return AnswerSettings(provider=work.provider, system=work.system), Workers(1)
    largest = max(sum(file.size for file in one.manifest.files.values()) for one in entries)
    if 2 * largest * usable_cores() > total_memory():
        return AnswerSettings(threads=work.threads, system=work.system), Workers(1)
    return AnswerSettings(system=work.system), Workers()


def _accuracy(row: EvaluationRow, about: str) -> Accuracy:
    """Return the first figure of a row as the report has it."""
    figure = row.figures[0]
    total = figure.value * row.questions
    if figure.interval == "wilson":  # a share of right answers; a mean of scores has a bootstrap interval
        return Accuracy(round(total), row.questions, figure.low, figure.high, about)
    return Accuracy(
        total, row.questions, figure.low, figure.high, f"{about} (a mean of scores, bootstrap interval)"
    )


def _notes(rows: Sequence[EvaluationRow], questions: Questions, settings: AnswerSettings) -> list[str]:
    notes = []
    if questions.skipped:
        notes.append(
            f"{len(questions.skipped)} questions could not be used; the first: {questions.skipped[0]}"
        )
    cut = [f"{row.asked.name} ({row.cut})" for row in rows if row.cut]
    if cut:
        notes.append(f"Answers were cut off at {settings.max_new_tokens} tokens: {', '.join(cut)}.")
    return notes
