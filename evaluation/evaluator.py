"""The evaluation itself: ask bundles questions, keep the answers, and judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from visprune.bundle import Bundle
from visprune.errors import InputError, UsageError
from visprune.evaluation.answering import Answer, AnswerJob, AnswerSettings, Candidate, identity
from visprune.evaluation.asking import Ask
from visprune.evaluation.formats import read_questions
from visprune.evaluation.ledger import Ledger
from visprune.evaluation.questions import Question, Questions, check
from visprune.evaluation.summary import EvaluatedBundle, Evaluation, summarise
from visprune.evaluation.workers import Workers, open_workers
from visprune.progress import Progress, no_progress
from visprune.runtime.backends import backend
from visprune.runtime.reading import check_texts
from visprune.verified import verify
from visprune.version import __version__

__all__ = ["AddedRows", "Baselines", "answers_depend_on", "asked_of_all", "evaluate"]

_DEFAULTS = AnswerSettings()
_AS_MANY_AS_FIT = Workers()


@dataclass(frozen=True, slots=True)
class AddedRows:
    """Candidates that are asked beside those of a user, and which of all are compared at equal counts.

    Attributes:
        candidates: The added ones; each has a label.
        pairs: Positions of a candidate and of a baseline with as many tokens, among the given candidates
            followed by the added ones.
        notes: Sentences about candidates that were added, or that could not be.
    """

    candidates: tuple[Candidate, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


Baselines = Callable[[Sequence[Candidate], Sequence[Bundle]], AddedRows]
"""Adds baselines to the given candidates, whose opened bundles it takes too."""


def evaluate(  # noqa: PLR0913 - the options of a run
    bundles: Sequence[str | Path | Candidate],
    questions: Questions | str | Path,
    *,
    settings: AnswerSettings = _DEFAULTS,
    workers: Workers = _AS_MANY_AS_FIT,
    output: Path | None = None,
    strict: bool = False,
    common: bool = False,
    force: bool = False,
    baselines: Baselines | None = None,
    announce: Callable[[Mapping[str, int]], None] | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Ask bundles questions with known answers.

    The figures do not depend on the workers, on the order in which answers come, or on whether a run was
    interrupted and continued.

    Args:
        bundles: Directories. `DIR@RATIO` asks a bundle at another ratio than it was exported for.
        questions: From `read_questions`, or the path of a JSONL file to read.
        settings: What answers depend on.
        workers: Who answers; by default as many processes of this machine as fit.
        output: The file of answers. If it exists, the run continues from it: questions that it answers are
            not asked again.
        strict: Whether to stop at the first question that cannot be used or asked.
        common: Whether all bundles are judged by the questions that each of them could be asked.
        force: Whether to start the file of answers anew.
        baselines: Adds candidates to compare with. It is called when everything else has been checked,
            because making bundles may take long.
        announce: Called before the first question with the number of questions that each candidate, by its
            name, will be asked.
        progress: Called after each answer, with the name of the bundle.

    Raises:
        UsageError: There is no bundle or question; or the file of answers cannot be written or belongs to
            other questions, settings or bundles.
        BundleError: A bundle cannot be read, or changes during the run.
        InputError: No question can be used or, with `strict`, one cannot; or a bundle cannot show the system
            prompt.
        MissingExtraError, UnsupportedError: The execution provider is not available, or a worker was ended.
    """
    if not isinstance(questions, Questions):
        questions = read_questions(questions)
    check(questions, strict=strict)
    backend(settings.provider)
    candidates = [one if isinstance(one, Candidate) else Candidate.parse(one) for one in bundles]
    if not candidates:
        raise UsageError("There is no bundle to evaluate.", "Name at least one directory.")
    asked = _prepared(candidates, questions, settings)
    with Ledger(output, answers_depend_on(questions, settings), force=force) as ledger:
        for one in asked:
            ledger.begin(one.candidate.name, one.job.identity)
        added = baselines(candidates, [one.bundle for one in asked]) if baselines else AddedRows()
        for one in _prepared(added.candidates, questions, settings):
            # Such a bundle is made anew for each run, so another one of that name is no mistake.
            ledger.begin(f"{one.candidate.name}, bundle {one.job.identity[:12]}", one.job.identity)
            asked.append(one)
        missing = {
            one.job.identity: len(_to_ask(questions, ledger.answers(one.job.identity), strict=strict))
            for one in asked
        }
        if any(missing.values()):
            if announce:
                names = {one.job.identity: one.candidate.name for one in reversed(asked)}
                announce({names[key]: count for key, count in missing.items()})
            largest = max(sum(file.size for file in one.bundle.manifest.files.values()) for one in asked)
            with open_workers(workers, [one.job for one in asked], max(missing.values()), largest) as ask:
                for one in asked:
                    _ask(ask, one, questions, ledger, strict=strict, progress=progress)
        answers = [ledger.answers(one.job.identity) for one in asked]
        found = summarise(
            asked_of_all(questions, answers) if common else questions,
            [_evaluated(one.candidate, one.bundle) for one in asked],
            answers,
            added.pairs,
        )
        return replace(found, notes=(*found.notes, *added.notes))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A candidate with its opened bundle and the job of its workers."""

    candidate: Candidate
    bundle: Bundle
    job: AnswerJob


def _prepared(
    candidates: Sequence[Candidate], questions: Questions, settings: AnswerSettings
) -> list[_Asked]:
    """Open the bundles of candidates, and check them.

    Raises:
        BundleError, InputError, UsageError: As for `evaluate`.
    """
    opened = [Bundle.open(one.path) for one in candidates]
    for bundle in opened:
        check_texts(bundle, system=settings.system)
    found = []
    for one, bundle in zip(candidates, opened, strict=True):
        placed = replace(one, path=one.path.resolve())
        job = AnswerJob(placed, identity(bundle, one), questions.instruction, settings)
        found.append(_Asked(one, bundle, job))
    for bundle in opened:
        verify(bundle)  # once, and not by every worker
    return found


def _ask(
    ask: Ask, one: _Asked, questions: Questions, ledger: Ledger, *, strict: bool, progress: Progress
) -> None:
    """Ask one candidate the questions that it has not answered, and keep its answers."""
    name, total = one.candidate.name, len(questions.usable)
    # Two candidates may be the same bundle: then only the first is asked.
    missing = _to_ask(questions, ledger.answers(one.job.identity), strict=strict)
    progress(name, total - len(missing), total)
    for done, found in enumerate(ask(one.job, missing), total - len(missing) + 1):
        if strict and found.error is not None:
            raise _cannot_be_asked(questions, found)
        ledger.add(one.job.identity, found)
        progress(name, done, total)


def answers_depend_on(questions: Questions, settings: AnswerSettings) -> dict[str, Any]:
    """Return everything besides the bundle that an answer depends on: a file of answers is bound to it.

    Which metric judges the answers is not part of it.
    """
    return {
        "data": questions.digest(),
        "instruction": questions.instruction,
        **asdict(settings),
        "visprune": __version__,
    }


def _to_ask(questions: Questions, known: Mapping[str, Answer], *, strict: bool) -> list[Question]:
    """Return the questions without an answer; if strict, also those that could not be asked before."""
    done = {key for key, found in known.items() if found.error is None or not strict}
    return [question for question in questions.usable if question.key not in done]


def asked_of_all(questions: Questions, answers: Sequence[Mapping[str, Answer]]) -> Questions:
    """Leave out the questions that some bundle could not be asked, such as those that are too long for it.

    If no question is left, all stay.
    """
    failed = {key for known in answers for key, found in known.items() if found.error is not None}
    usable = tuple(question for question in questions.usable if question.key not in failed)
    if not failed or not usable:
        return questions
    left_out = f"{len(failed)} questions could not be asked of every bundle, and are left out for all."
    return replace(questions, usable=usable, skipped=(*questions.skipped, left_out))


def _cannot_be_asked(questions: Questions, found: Answer) -> InputError:
    where = next(question.where for question in questions.usable if question.key == found.key)
    return InputError(
        f"{where}: {found.error}", "Correct the data, or leave such questions out without --strict."
    )


def _evaluated(candidate: Candidate, bundle: Bundle) -> EvaluatedBundle:
    manifest = bundle.manifest
    keep = candidate.keep(manifest)
    inside = manifest.layer_pruning
    before_all = keep.tokens == manifest.pruning.budget.visual_tokens
    return EvaluatedBundle(
        candidate.name, manifest.source.model, before_all and (inside is None or keep.layer_ratio == 1.0)
    )
