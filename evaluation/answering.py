"""One bundle answers one question: what every worker does, in whichever process, on whichever machine.

Answers are greedy, one question at a time, and a worker has the same number of threads however many workers
there are: so an answer depends on nothing but the job and the question.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from visprune.bundle import Bundle
from visprune.errors import BundleError, InputError
from visprune.evaluation.questions import Question
from visprune.runtime.generation import GenerationLimits
from visprune.runtime.pipeline import Pipeline, check_threads, load, threads_for
from visprune.runtime.vision.kept_tokens import keep_for

__all__ = ["Answer", "Candidate", "Job", "Settings", "answer", "check", "close", "identity"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is evaluated: a bundle, and the fraction of visual tokens it keeps.

    Attributes:
        path: Its directory.
        ratio: As in `Pipeline.generate`; what it was exported for if None.
    """

    path: Path
    ratio: float | None = None

    @classmethod
    def parse(cls, text: str | Path) -> Candidate:
        """From `DIR`, or `DIR@RATIO`. A directory whose own name has such an end is taken as it is."""
        path, mark, ratio = str(text).rpartition("@")
        if mark and not Path(text).exists():
            try:
                return cls(Path(path), float(ratio))
            except ValueError:
                pass
        return cls(Path(text))

    @property
    def name(self) -> str:
        """As the user gives it."""
        return str(self.path) if self.ratio is None else f"{self.path}@{self.ratio:g}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What answers depend on, beside bundle and question.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        threads: Processor threads of each worker. Another number may change the last bits of sums.
        provider: What runs the graphs.
        system: A system prompt before each question.

    Raises:
        UsageError: A number that cannot be.
    """

    max_new_tokens: int = 16
    threads: int = 1
    provider: str = "cpu"
    system: str | None = None

    def __post_init__(self) -> None:
        GenerationLimits(self.max_new_tokens)
        check_threads(self.threads)


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate, to be asked.

    Attributes:
        path: The bundle, absolute.
        identity: Of the bundle; see `identity`.
        ratio: Of the candidate.
        instruction: Put after each question.
        settings: The others.
    """

    path: Path
    identity: str
    ratio: float | None
    instruction: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered.

    Attributes:
        key: The question's.
        text: As generated.
        finish_reason: Why it ended there.
        tokens_kept: Visual tokens kept.
        visual_tokens: Visual tokens before pruning.
        error: Why the question could not be asked: a picture that cannot be read, a prompt that is too long.
    """

    key: str
    text: str = ""
    finish_reason: str = ""
    tokens_kept: int = 0
    visual_tokens: int = 0
    error: str | None = None


def identity(bundle: Bundle, ratio: float | None) -> str:
    """A hash of everything in a bundle that its answers depend on, and of the ratio asked for.

    Raises:
        UsageError: The bundle cannot keep that.
    """
    manifest = bundle.manifest
    known = asdict(manifest)
    for part in ("schema_version", "source", "parity", "quantization"):  # what is said of it, and when
        known.pop(part)
    data = [known, asdict(keep_for(manifest, ratio=ratio))]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def answer(job: Job, question: Question) -> Answer:
    """Ask.

    Raises:
        BundleError: The bundle is not there, or is another one.
        UnsupportedError: There is not enough memory.
    """
    pipeline = _opened(job)
    try:
        found = pipeline.generate(
            question.image,
            question.prompt(job.instruction),
            max_new_tokens=job.settings.max_new_tokens,
            system=job.settings.system,
            ratio=job.ratio,
        )
    except InputError as error:
        return Answer(question.key, error=error.what)
    return Answer(question.key, found.text, found.finish_reason, found.tokens_kept, found.visual_tokens)


def check(job: Job) -> None:
    """Refuse a bundle that is not the job's.

    Raises:
        BundleError: It is not there, or is another one.
    """
    if identity(Bundle.open(job.path), job.ratio) != job.identity:
        raise BundleError(
            f"{job.path} is not the bundle that it was when the evaluation began.", "Run it again."
        )


_open: dict[tuple[Path, str, int, str], Pipeline] = {}
"""The bundle that this process has loaded: one, so that two never take memory at once."""


def _opened(job: Job) -> Pipeline:
    settings = job.settings
    key = (job.path, job.identity, settings.threads, settings.provider)
    if key not in _open:
        close()
        check(job)
        threads = threads_for(settings.provider, settings.threads)
        _open[key] = load(job.path, provider=settings.provider, threads=threads)
    return _open[key]


def close() -> None:
    """Free what this process has loaded."""
    while _open:
        _open.popitem()[1].close()
