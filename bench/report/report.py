"""What a comparison found: a tree of records, which `--json` writes and `read_report` reads.

Times are milliseconds, memory is bytes, work is FLOP (a multiply-accumulate is two), energy is joules. The
schema is described in the documentation's page on the bench.
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

Role = Literal["given", "unpruned", "random", "pytorch"]
"""Asked for; or there to compare with: nothing pruned, drawn at random, the checkpoint in PyTorch."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What every row does in every round.

    Attributes:
        images: Files, or `data:` URLs; all of them stand in one prompt.
        prompt: The text after them.
        max_new_tokens: Tokens generated, whatever they are: the token that ends an answer does not end it.
        rounds: How often each row is timed.
        warm_up: Rounds before those.
        provider: What runs the graphs.
        threads: Processor threads of each row.
        system: The system prompt, with which the prompt begins.

    Raises:
        UsageError: There is no picture or prompt, or a number that cannot be.
    """

    images: tuple[str, ...]
    prompt: str
    max_new_tokens: int
    threads: int
    rounds: int = 10
    warm_up: int = 2
    provider: str = "cpu"
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.images:
            raise UsageError("There is no picture, so there are no visual tokens.", "Give one with --image.")
        if not self.prompt.strip():
            raise UsageError("The prompt is empty.", "Give a question or an instruction with --prompt.")
        if self.max_new_tokens < 2:
            raise UsageError(
                f"{self.max_new_tokens} new tokens have no time for each.",
                "Give --max-new-tokens of at least 2.",
            )
        if self.rounds < 2 or self.warm_up < 0:
            raise UsageError(f"{self.rounds} rounds have no spread.", "Give --rounds of at least 10.")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured.

    Attributes:
        processor: Its name.
        cores: Physical ones that may be used.
        memory: Bytes.
        system: Operating system and architecture.
        python: Its version.
        packages: Versions of visprune and of what computed.
        gpu: Its name, where a row may have used one.
        energy_counter: What counted energy, and over what; or why nothing did.
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
    """One prompt with its answer.

    Attributes:
        first_token: Milliseconds to the first token, reading the picture's file included.
        stages: Milliseconds: `preprocess`, each graph by its name (the decoder's as `prefill`), `other` for
            the rest.
        per_token: Milliseconds of each later token, their mean.
        energy: Joules while it ran, of all that the counter counts.
    """

    first_token: float
    stages: dict[str, float]
    per_token: float
    energy: float | None = None


@dataclass(frozen=True, slots=True)
class Flops:
    """Theoretical work of the prefill, in FLOP; see `visprune.estimate.flops`.

    Attributes:
        convention: Of the decoder's layers, F2 or F3.
        decoder: Its layers, on visual and text tokens.
        model: That, and vision tower, projector, and the logits of one position.
        unpruned_decoder: The same without pruning.
        unpruned_model: Likewise.
    """

    convention: Literal["F2", "F3"]
    decoder: int
    model: int
    unpruned_decoder: int
    unpruned_model: int

    @property
    def removed(self) -> float:
        """The share of the model's work that pruning removes."""
        return 1.0 - self.model / self.unpruned_model


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Exact match on questions, with the 95% interval of Wilson."""

    right: int
    of: int
    low: float
    high: float
    questions: str

    @property
    def share(self) -> float:
        """Of the questions that were answered right."""
        return self.right / self.of


@dataclass(frozen=True, slots=True)
class Row:
    """One bundle at one ratio, or one checkpoint in PyTorch.

    Attributes:
        name: In tables; no two are alike.
        role: Why it is here.
        path: Directory of the bundle or checkpoint.
        model: Name of the model.
        weights: SHA-256 of the checkpoint's weights.
        method: Of pruning.
        precision: fp32, fp16, bf16, or what linear layers were quantized to.
        visual_tokens: Of the prompt, before any pruning.
        layer_tokens: Tokens of the images that entered each layer of the LLM.
        text_tokens: Of the prompt.
        new_tokens: Generated.
        disk_bytes: All files.
        load: Milliseconds to load them, their hashes known from before.
        memory_bytes: Largest resident set of the process, all that Python needs included.
        device_bytes: Most memory of the GPU that was seen after a repetition; None where it has none or the
            driver does not say.
        cache_bytes: Keys and values after the prefill.
        flops: None where the bundle does not know its shapes.
        repetitions: In the order of the rounds.
        realised: Share of the time to the first token that pruning saved, by the share of the model's FLOP
            that it removes; 1 if time shrinks as the work does. None where there is nothing to compare.
        accuracy: None where not measured.
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
        """Visual tokens, their mean over the layers of the LLM."""
        return sum(self.layer_tokens) / len(self.layer_tokens)

    @property
    def prunes_inside(self) -> bool:
        """Whether layers have different numbers of tokens."""
        return any(a != b for a, b in pairwise(self.layer_tokens))

    @property
    def first_token(self) -> Summary:
        """Milliseconds to the first token."""
        return Summary.of([one.first_token for one in self.repetitions])

    @property
    def per_token(self) -> Summary:
        """Milliseconds of each later token."""
        return Summary.of([one.per_token for one in self.repetitions])

    @property
    def energy(self) -> Summary | None:
        """Joules of a prompt with its answer."""
        known = [one.energy for one in self.repetitions if one.energy is not None]
        return Summary.of(known) if known else None

    @property
    def stages(self) -> dict[str, Summary]:
        """Milliseconds of each stage of the first token."""
        names = {name: None for one in self.repetitions for name in one.stages}
        return {name: Summary.of([one.stages.get(name, 0.0) for one in self.repetitions]) for name in names}

    @property
    def prefill_speed(self) -> float:
        """Tokens a second that the LLM reads: those that entered it, by the time of all its graphs."""
        spent = [sum(ms for n, ms in one.stages.items() if is_prefill(n)) for one in self.repetitions]
        return 1e3 * (self.layer_tokens[0] + self.text_tokens) / Summary.of(spent).median

    @property
    def decode_speed(self) -> float:
        """Tokens a second that it writes."""
        return 1e3 / self.per_token.median

    def against(self, other: Row, metric: Literal["first_token", "per_token"] = "first_token") -> Difference:
        """How long this row takes by how long the other does, from the pairs of each round."""
        mine, theirs = ([getattr(one, metric) for one in row.repetitions] for row in (self, other))
        return difference(mine, theirs)


def is_prefill(stage: str) -> bool:
    """Whether a stage is a part of the LLM: one graph, or segments and what prunes between them."""
    return stage.startswith(("prefill", "segment_pruner"))


@dataclass(frozen=True, slots=True)
class NotMade:
    """What was wanted and is not in the table, and why."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All of it.

    Attributes:
        schema_version: Of this tree.
        created: When, in UTC, ISO 8601.
        machine: Where.
        work: What.
        rows: In the order of the table.
        not_made: What is missing.
        notes: Sentences that belong to the table.
    """

    schema_version: int
    created: str
    machine: Machine
    work: Workload
    rows: tuple[Row, ...]
    not_made: tuple[NotMade, ...] = ()
    notes: tuple[str, ...] = ()

    def unpruned(self, row: Row) -> Row | None:
        """The row to compare one with: the same model in the same precision, or in PyTorch any."""
        alike = [one for one in self.rows if one.role == "unpruned" and one.weights == row.weights]
        if row.role == "pytorch":
            return alike[0] if alike else None
        return next((one for one in alike if one.precision == row.precision), None)

    def to_json(self) -> str:
        """The text of a JSON file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def read_report(path: str | Path) -> BenchReport:
    """Read what `to_json` wrote.

    Raises:
        UsageError: The file cannot be read, or is of another version.
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
    """The row of the smallest median, and those that cannot be told apart from it."""
    first = min(rows, key=lambda row: getattr(row, metric).median)
    ties = tuple(row for row in rows if row is not first and not row.against(first, metric).told)
    return first, ties
