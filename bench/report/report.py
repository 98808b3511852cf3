"""The report of a comparison: a tree of records, which `--json` writes and `read_report` reads.

Times are in milliseconds, memory in bytes, work in FLOP (a multiply-accumulate is two) and energy in joules.
The documentation's page on the bench describes the schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from visprune.bench.report.statistics import Difference, Summary, difference
from visprune.errors import UsageError
from visprune.records import from_json

__all__ = [
    "BASELINES",
    "SCHEMA_VERSION",
    "Accuracy",
    "BenchReport",
    "Flops",
    "Machine",
    "NotMade",
    "Repetition",
    "Role",
    "Row",
    "Workload",
    "fastest",
    "is_prefill",
    "read_report",
]

SCHEMA_VERSION = 1

Role = Literal["given", "unpruned", "random", "resize", "pytorch"]
"""A row that was asked for, or one to compare with: unpruned, of random tokens, of a smaller picture, or in
PyTorch."""

BASELINES: tuple[Role, ...] = ("random", "resize")
"""The methods that every comparison has rows of. Such a row has its method as its role."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of every row in every round.

    Attributes:
        images: Files or `data:` URLs; all images are in one prompt.
        prompt: The text after the images.
        max_new_tokens: Number of tokens to generate. The token that ends an answer does not stop it.
        rounds: How often each row is timed.
        warm_up: Rounds before these, which do not count.
        provider: The execution provider that runs the graphs.
        threads: Processor threads of each row.
        system: The system prompt, with which the prompt begins.
        cached: Whether the features of the images are kept from the warm-up rounds, as for a second question
            about an image.

    Raises:
        UsageError: There is no image or prompt, or a number is out of range.
    """

    images: tuple[str, ...]
    prompt: str
    max_new_tokens: int
    threads: int
    rounds: int = 10
    warm_up: int = 2
    provider: str = "cpu"
    system: str | None = None
    cached: bool = False

    def __post_init__(self) -> None:
        if self.cached and not self.warm_up:
            raise UsageError("Without a warm-up round nothing is cached.", "Give one.")
        if not self.images:
            raise UsageError("There is no picture, so there are no visual tokens.", "Give one with --image.")
        if not self.prompt.strip():
            raise UsageError("The prompt is empty.", "Give a question or an instruction with --prompt.")
        if self.max_new_tokens < 2:
            raise UsageError(
                f"With {self.max_new_tokens} new tokens, the time of each further token cannot be measured.",
                "Give --max-new-tokens of at least 2.",
            )
        if self.rounds < 2 or self.warm_up < 0:
            raise UsageError(f"{self.rounds} rounds have no spread.", "Give --rounds of at least 10.")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        processor: Name of the processor.
        cores: Number of physical cores that may be used.
        memory: Main memory in bytes.
        system: Operating system and architecture.
        python: Version of Python.
        packages: Versions of visprune and of the packages that computed.
        gpu: Name of the GPU, if rows may have used one.
        energy_counter: The counter of energy and what it covers, or why there is none.
    """

    processor: str
    cores: int
    memory: int
    system: str
    python: str
    packages: dict[str, str]
    gpu: str | None
    energy_counter: str


@dataclass(frozen=True, slots=True)
class Repetition:
    """The measurement of one prompt with its answer.

    Attributes:
        first_token: Milliseconds to the first token, reading the image file included.
        stages: Milliseconds of `preprocess`, of each graph by its name (the decoder's as `prefill`), and of
            the rest as `other`.
        per_token: Mean milliseconds of a later token.
        energy: Joules used meanwhile, by everything that the counter covers; None without a counter.
    """

    first_token: float
    stages: dict[str, float]
    per_token: float
    energy: float | None = None


@dataclass(frozen=True, slots=True)
class Flops:
    """Theoretical work of the prefill in FLOP; see `visprune.estimate.flops`.

    Attributes:
        convention: How the decoder's layers are counted, F2 or F3.
        decoder: Work of the decoder's layers, on visual and text tokens.
        model: The same plus vision tower, projector, and the logits of one position.
        unpruned_decoder: `decoder` without pruning.
        unpruned_model: `model` without pruning.
    """

    convention: Literal["F2", "F3"]
    decoder: int
    model: int
    unpruned_decoder: int
    unpruned_model: int

    @property
    def removed(self) -> float:
        """Share of the model's work that pruning removes."""
        return 1.0 - self.model / self.unpruned_model


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy on questions with known answers, with its 95% interval.

    Attributes:
        right: Number of right answers. With a metric that gives parts of a point, as VQA accuracy does: the
            sum of the scores.
        of: Number of questions.
        low: Lower end of the interval: Wilson's or, for a sum of scores, a bootstrap interval.
        high: Upper end.
        questions: The questions and the metric, in words.
    """

    right: int | float
    of: int
    low: float
    high: float
    questions: str

    @property
    def share(self) -> float:
        """Share of right answers, or mean score, from 0 to 1."""
        return self.right / self.of


@dataclass(frozen=True, slots=True)
class Row:
    """One bundle at one ratio, or one checkpoint in PyTorch.

    Attributes:
        name: The name in tables; no two are alike.
        role: Why the row is in the report.
        path: Directory of the bundle or checkpoint.
        model: Name of the model.
        weights: SHA-256 of the checkpoint's weights.
        method: Pruning method.
        precision: fp32, fp16, bf16, or the precision that linear layers were quantized to.
        visual_tokens: Visual tokens of the prompt before pruning.
        layer_tokens: Visual tokens that entered each layer of the LLM.
        text_tokens: Text tokens of the prompt.
        new_tokens: Generated tokens.
        disk_bytes: Size of all files.
        load: Milliseconds to load the files, whose hashes were checked before.
        memory_bytes: Largest resident set of the process, including Python and its libraries.
        device_bytes: The most GPU memory seen after a repetition; None without a GPU, or if the driver does
            not report it.
        cache_bytes: Size of keys and values after the prefill.
        flops: Theoretical work; None if the bundle does not know its shapes.
        repetitions: The measurements, in the order of the rounds.
        realised: Share of the time to the first token that pruning saved, divided by the share of the
            model's FLOP that it removes; 1 if time shrinks as the work does. None without an unpruned row.
        accuracy: None if it was not measured.
    """

    name: str
    role: Role
    path: str
    model: str
    weights: str
    method: str
    precision: str
    visual_tokens: int
    layer_tokens: tuple[int, ...]
    text_tokens: int
    new_tokens: int
    disk_bytes: int
    load: float
    memory_bytes: int
    device_bytes: int | None
    cache_bytes: int
    flops: Flops | None
    repetitions: tuple[Repetition, ...]
    realised: float | None = None
    accuracy: Accuracy | None = None

    @property
    def kept(self) -> float:
        """Mean number of visual tokens over the layers of the LLM."""
        return sum(self.layer_tokens) / len(self.layer_tokens)

    @property
    def prunes_inside(self) -> bool:
        """Whether the layers have different numbers of visual tokens."""
        return any(a != b for a, b in pairwise(self.layer_tokens))

    @property
    def first_token(self) -> Summary:
        """Milliseconds to the first token."""
        return Summary.of([one.first_token for one in self.repetitions])

    @property
    def per_token(self) -> Summary:
        """Milliseconds of a later token."""
        return Summary.of([one.per_token for one in self.repetitions])

    @property
    def energy(self) -> Summary | None:
        """Joules of a prompt with its answer; None if not counted."""
        known = [one.energy for one in self.repetitions if one.energy is not None]
        return Summary.of(known) if known else None

    @property
    def stages(self) -> dict[str, Summary]:
        """Milliseconds of each stage before the first token."""
        names = {name: None for one in self.repetitions for name in one.stages}
        return {name: Summary.of([one.stages.get(name, 0.0) for one in self.repetitions]) for name in names}

    @property
    def prefill_speed(self) -> float:
        """Tokens per second in the prefill: tokens that entered the LLM, by the time of its graphs."""
        spent = [sum(ms for n, ms in one.stages.items() if is_prefill(n)) for one in self.repetitions]
        return 1e3 * (self.layer_tokens[0] + self.text_tokens) / Summary.of(spent).median

    @property
    def decode_speed(self) -> float:
        """Tokens per second in decoding."""
        return 1e3 / self.per_token.median

    def against(self, other: Row, metric: Literal["first_token", "per_token"] = "first_token") -> Difference:
        """Return the time of this row divided by that of another, from the pairs of each round."""
        mine, theirs = ([getattr(one, metric) for one in row.repetitions] for row in (self, other))
        return difference(mine, theirs)


def is_prefill(stage: str) -> bool:
    """Return whether a stage belongs to the LLM: a graph of it, or a pruner between two segments."""
    return stage.startswith(("prefill", "segment_pruner"))


@dataclass(frozen=True, slots=True)
class NotMade:
    """A row that was wanted and is missing, and the reason."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """The whole report.

    Attributes:
        schema_version: Version of this tree.
        created: Time of the measurement, in UTC, ISO 8601.
        machine: The machine.
        work: The work of each row.
        rows: The rows, in the order of the table.
        not_made: The rows that are missing.
        notes: Sentences to read with the table.
    """

    schema_version: int
    created: str
    machine: Machine
    work: Workload
    rows: tuple[Row, ...]
    not_made: tuple[NotMade, ...] = ()
    notes: tuple[str, ...] = ()

    def unpruned(self, row: Row) -> Row | None:
        """Return the unpruned row of the same model and precision; for a row of PyTorch, of any precision."""
        alike = [one for one in self.rows if one.role == "unpruned" and one.weights == row.weights]
        if row.role == "pytorch":
            return alike[0] if alike else None
        return next((one for one in alike if one.precision == row.precision), None)

    def to_json(self) -> str:
        """Return the report as the text of a JSON file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def read_report(path: str | Path) -> BenchReport:
    """Read the JSON file of a report.

    Raises:
        UsageError: The file cannot be read, or has another schema version.
        BundleError: A field is missing, unknown or of the wrong type.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read as a report: {error}.", "Give a file of visprune-bench --json."
        ) from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path} is a report of schema {version}, and this visprune reads {SCHEMA_VERSION}.",
            "Measure again with this version.",
        )
    return from_json(BenchReport, data, str(path))


def fastest(rows: Sequence[Row], metric: Literal["first_token", "per_token"]) -> tuple[Row, tuple[Row, ...]]:
    """Return the row with the smallest median, and the rows that cannot be told apart from it."""
    first = min(rows, key=lambda row: getattr(row, metric).median)
    ties = tuple(row for row in rows if row is not first and not row.against(first, metric).told)
    return first, ties
