"""Ask bundles questions, and judge what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from visprune.bundle import Bundle
from visprune.errors import InputError, UsageError
from visprune.evaluation.answering import Answer, AnswerJob, AnswerSettings, Candidate, identity
from visprune.evaluation.formats import read_questions
from visprune.evaluation.ledger import Ledger
from visprune.evaluation.questions import Question, Questions, check
from visprune.evaluation.summary import EvaluatedBundle, Evaluation, summarise
from visprune.evaluation.workers import Workers, open_workers
from visprune.progress import Progress, no_progress
from visprune.runtime.backends import backend
from visprune.runtime.reading import check_texts
from visprune.runtime.vision.kept_tokens import keep_for
from visprune.verified import verify
from visprune.version import __version__

__all__ = ["evaluate"]

_DEFAULTS = AnswerSettings()
_AS_MANY_AS_FIT = Workers()


def evaluate(
    bundles: Sequence[str | Path | Candidate],
    questions: Questions | str | Path,
    *,
    settings: AnswerSettings = _DEFAULTS,
    workers: Workers = _AS_MANY_AS_FIT,
    output: Path | None = None,
    strict: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> Evaluation:
    """Ask bundles questions with known answers.

    The figures do not depend on the workers, on the order of answers, or on whether a run was stopped and
    went on.

    Args:
        bundles: Directories; `DIR@RATIO` asks a bundle at another ratio than it was exported for.
        questions: From `read_questions`, or the path of a JSONL file that it reads.
        settings: What answers depend on.
        workers: Who answers; by default as many processes of this machine as have room.
        output: The file of answers; one that is there is gone on with, and what it holds is not asked again.
        strict: Whether a question that cannot be used or asked ends it all.
        force: Whether the file of answers is begun again.
        progress: Called after each answer.

    Raises:
        UsageError: No bundle or question; a file of answers that cannot be written, or is of something else.
        BundleError: A bundle that cannot be read, or changes meanwhile.
        InputError: Every question had to be left out; with `strict`, any. Or a bundle cannot show the system
            prompt.
        MissingExtraError, UnsupportedError: What runs the graphs cannot be had, or a worker was ended.
    """
    if not isinstance(questions, Questions):
        questions = read_questions(questions)
    check(questions, strict=strict)
    backend(settings.provider)
    candidates = [one if isinstance(one, Candidate) else Candidate.parse(one) for one in bundles]
    if not candidates:
        raise UsageError("There is no bundle to evaluate.", "Name at least one directory.")
    opened = [Bundle.open(one.path) for one in candidates]
    for bundle in opened:
        check_texts(bundle, system=settings.system)
    jobs = [
        AnswerJob(one.path.resolve(), identity(bundle, one.ratio), one.ratio, questions.instruction, settings)
        for one, bundle in zip(candidates, opened, strict=True)
    ]
    for bundle in opened:
        verify(bundle)  # once, and not by every worker
    asked = {
        "data": questions.digest(),
        "instruction": questions.instruction,
        **asdict(settings),
        "visprune": __version__,
    }
    with Ledger(output, asked, force=force) as ledger:
        for one, job in zip(candidates, jobs, strict=True):
            ledger.begin(one.name, job.identity)
        most = max(len(_todo(questions, ledger.answers(job.identity), strict=strict)) for job in jobs)
        if most:
            largest = max(sum(file.size for file in bundle.manifest.files.values()) for bundle in opened)
            with open_workers(workers, jobs, most, largest) as ask:
                for one, job in zip(candidates, jobs, strict=True):
                    # Two candidates may be the same: what one has answered, the other is not asked.
                    missing = _todo(questions, ledger.answers(job.identity), strict=strict)
                    total = len(questions.usable)
                    progress(one.name, total - len(missing), total)
                    for done, found in enumerate(ask(job, missing), total - len(missing) + 1):
                        if strict and found.error is not None:
                            raise _cannot_be_asked(questions, found)
                        ledger.add(job.identity, found)
                        progress(one.name, done, total)
        return summarise(
            questions,
            [_about(one, bundle) for one, bundle in zip(candidates, opened, strict=True)],
            [ledger.answers(job.identity) for job in jobs],
        )


def _todo(questions: Questions, known: Mapping[str, Answer], *, strict: bool) -> list[Question]:
    """What is not answered yet; where nothing may be left out, also what could not be asked."""
    done = {key for key, found in known.items() if found.error is None or not strict}
    return [question for question in questions.usable if question.key not in done]


def _cannot_be_asked(questions: Questions, found: Answer) -> InputError:
    where = next(question.where for question in questions.usable if question.key == found.key)
    return InputError(
        f"{where}: {found.error}", "Mend the data, or leave such questions out without --strict."
    )


def _about(candidate: Candidate, bundle: Bundle) -> EvaluatedBundle:
    manifest = bundle.manifest
    keep = keep_for(manifest, ratio=candidate.ratio)
    inside = manifest.layer_pruning
    before_all = keep.tokens == manifest.pruning.budget.visual_tokens
    return EvaluatedBundle(
        candidate.name, manifest.source.model, before_all and (inside is None or keep.layer_ratio == 1.0)
    )
