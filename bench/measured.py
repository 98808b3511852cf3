"""What a calibration takes from the JSON of `visprune-bench`; whatever else is in it is passed over."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from visprune.errors import BundleError, UsageError
from visprune.records import from_json

__all__ = ["Measured", "MeasuredRow", "Repetition", "is_prefill", "read_measured"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Repetition:
    """One prompt with its answer.

    Attributes:
        stages: Milliseconds of each graph by its name, the decoder's as `prefill` or `prefill ...`.
        per_token: Milliseconds of each later token, their mean.
    """

    stages: dict[str, float]
    per_token: float


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """One bundle at one ratio.

    Attributes:
        name: In tables.
        role: "pytorch" where it is no bundle.
        path: Directory of the bundle.
        precision: fp32, fp16, or what linear layers were quantized to.
        layer_tokens: Tokens of the images that entered each layer of the LLM.
        text_tokens: Of the prompt.
        new_tokens: Generated.
        repetitions: In the order they ran.
    """

    name: str
    role: str
    path: str
    precision: str
    layer_tokens: tuple[int, ...]
    text_tokens: int
    new_tokens: int
    repetitions: tuple[Repetition, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement.

    Attributes:
        processor: Its name.
        memory: Bytes of the machine.
        gpu: Its name, where one may have been used.
        provider: What ran the graphs.
        threads: Of the processor.
        images: In the prompt.
        rows: What was measured.
    """

    processor: str
    memory: int
    gpu: str | None
    provider: str
    threads: int
    images: tuple[str, ...]
    rows: tuple[MeasuredRow, ...]


def is_prefill(stage: str) -> bool:
    """Whether a stage is a part of the LLM: one graph, or segments and what prunes between them."""
    return stage.startswith(("prefill", "segment_pruner"))


def read_measured(path: str | Path) -> Measured:
    """Read the JSON of `visprune-bench`.

    Raises:
        UsageError: It cannot be read, or measured nothing.
        BundleError: A field is missing or of the wrong type.
    """
    hint = "Give a file of visprune-bench --json."
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            {**row, "repetitions": [_of(Repetition, r) for r in row["repetitions"]]} for row in data["rows"]
        ]
        parts = {**data["machine"], **data["work"], "rows": [_of(MeasuredRow, row) for row in rows]}
        found = from_json(Measured, _of(Measured, parts), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", hint) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON.", hint) from None
    except (KeyError, TypeError, AttributeError):
        raise BundleError(f"{path} is no measurement of bundles.", hint) from None
    if not all(row.repetitions and row.layer_tokens for row in found.rows):
        raise BundleError(f"{path} has a row without repetitions or layers.", hint)
    return found


def _of(kind: type[T], data: dict[str, Any]) -> dict[str, Any]:
    """The fields that a dataclass has."""
    return {f.name: data[f.name] for f in fields(kind) if f.name in data}  # type: ignore[arg-type]
