"""One bundle answers one question: the work of every worker, in whichever process and on whichever machine.

Answers are greedy, one question at a time, and each worker has the same number of threads however many
workers there are. So an answer depends on nothing but the job and the question.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from visprune.bundle import Bundle
from visprune.errors import BundleError, InputError
from visprune.evaluation.questions import Question
from visprune.manifest import Manifest
from visprune.runtime.generation import GenerationLimits
from visprune.runtime.loading import check_threads, load, threads_for
from visprune.runtime.pipeline import Pipeline
from visprune.runtime.vision.kept_tokens import Keep, keep_for

__all__ = ["Answer", "AnswerJob", "AnswerSettings", "Candidate", "answer", "check", "close", "identity"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bundle to evaluate, and how many visual tokens it keeps.

    The number that the bundle was exported for is kept if neither a ratio nor a number of tokens is given.

    Attributes:
        path: Directory of the bundle.
        ratio: Fraction of visual tokens to keep, as in `Pipeline.generate`.
        keep_tokens: Visual tokens of one tile to keep, as in `Pipeline.generate`.
        label: The name in tables, for a bundle that no user named.
    """

    path: Path
    ratio: float | None = None
    keep_tokens: int | None = None
    label: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> Candidate:
        """Read `DIR` or `DIR@RATIO`. If a directory has that whole name, the `@` is part of the name."""
        path, mark, ratio = str(text).rpartition("@")
        if mark and not Path(text).exists():
            try:
                return cls(Path(path), float(ratio))
            except ValueError:
                pass
        return cls(Path(text))

    @property
    def name(self) -> str:
        """The name in tables: the label, or else the path as given, with the ratio or the count."""
        if self.label is not None:
            return self.label
        if self.keep_tokens is not None:
            return f"{self.path}, {self.keep_tokens} tokens"
        return str(self.path) if self.ratio is None else f"{self.path}@{self.ratio:g}"

    def keep(self, manifest: Manifest) -> Keep:
        """Return the numbers of tokens that this bundle keeps.

        Raises:
            UsageError: Both a ratio and a number of tokens are given, or the bundle cannot keep that many.
        """
        return keep_for(manifest, ratio=self.ratio, keep_tokens=self.keep_tokens)


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """Settings that answers depend on, besides the bundle and the question.

    Attributes:
        max_new_tokens: The most tokens of an answer.
        threads: Processor threads of each worker. Another number may change the last bits of sums.
        provider: The execution provider that runs the graphs.
        system: A system prompt before each question.

    Raises:
        UsageError: A number is out of range.
    """

    max_new_tokens: int = 16
    threads: int = 1
    provider: str = "cpu"
    system: str | None = None

    def __post_init__(self) -> None:
        GenerationLimits(self.max_new_tokens)
        check_threads(self.threads)


@dataclass(frozen=True, slots=True)
class AnswerJob:
    """Everything that a worker needs to ask one candidate.

    Attributes:
        candidate: The bundle, with an absolute path.
        identity: The hash that `identity` gave for it when the evaluation began.
        instruction: A line to put after each question.
        settings: The other settings.
    """

    candidate: Candidate
    identity: str
    instruction: str
    settings: AnswerSettings


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question.

    Attributes:
        key: Key of the question.
        text: The generated text.
        finish_reason: Why generation ended, as in `Generation`.
        tokens_kept: Visual tokens kept.
        visual_tokens: Visual tokens before pruning.
        error: Why the question could not be asked, for instance an image that cannot be read or a prompt
            longer than the context. None if it was asked.
    """

    key: str
    text: str = ""
    finish_reason: str = ""
    tokens_kept: int = 0
    visual_tokens: int = 0
    error: str | None = None


def identity(bundle: Bundle, candidate: Candidate) -> str:
    """Return a hash of everything in a bundle that its answers depend on, and of the tokens it keeps.

    Raises:
        UsageError: The bundle cannot keep that many tokens.
    """
    known = asdict(bundle.manifest)
    for part in ("schema_version", "source", "parity", "quantization"):  # these change no answer
        known.pop(part)
    data = [known, asdict(candidate.keep(bundle.manifest))]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def answer(job: AnswerJob, question: Question) -> Answer:
    """Ask one question.

    Raises:
        BundleError: The bundle is gone or has changed.
        UnsupportedError: There is not enough memory.
    """
    pipeline = _opened(job)
    try:
        found = pipeline.generate(
            question.image,
            question.prompt(job.instruction),
            max_new_tokens=job.settings.max_new_tokens,
            system=job.settings.system,
            ratio=job.candidate.ratio,
            keep_tokens=job.candidate.keep_tokens,
        )
    except InputError as error:
        return Answer(question.key, error=error.what)
    return Answer(question.key, found.text, found.finish_reason, found.tokens_kept, found.visual_tokens)


def check(job: AnswerJob) -> None:
    """Check that the bundle is still the one that the job was made for.

    Raises:
        BundleError: The bundle is gone or has changed.
    """
    path = job.candidate.path
    if identity(Bundle.open(path), job.candidate) != job.identity:
        raise BundleError(f"{path} has changed since the evaluation began.", "Run the evaluation again.")


# Bytes for features of images, because many sets ask several questions in a row about each image.
_PICTURE_CACHE = 64_000_000

_open: dict[tuple[Path, str, int, str], Pipeline] = {}
"""The bundle that this process has loaded. It holds at most one, so that two never take memory at once."""


def _opened(job: AnswerJob) -> Pipeline:
    path, settings = job.candidate.path, job.settings
    key = (path, job.identity, settings.threads, settings.provider)
    if key not in _open:
        close()
        check(job)
        threads = threads_for(settings.provider, settings.threads)
        _open[key] = load(path, provider=settings.provider, threads=threads, picture_cache=_PICTURE_CACHE)
    return _open[key]


def close() -> None:
    """Free the bundle that this process has loaded."""
    while _open:
        _open.popitem()[1].close()
