"""Calibration data: lines of {"image": path, "prompt": text}, image paths relative to the file.

Everything that can be wrong with the data is said before a model is loaded, with the line's number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visprune.errors import InputError, UsageError
from visprune.runtime.images import decode

__all__ = ["CalibrationLine", "draw_lines", "read_lines"]

_FORM = 'Write a line for each sample: {"image": "cat.png", "prompt": "What is in the picture?"}'


@dataclass(frozen=True, slots=True)
class CalibrationLine:
    """One sample.

    Attributes:
        where: File and line, for errors.
        image: The picture, which can be read.
        prompt: What the user says.
    """

    where: str
    image: Path
    prompt: str


def read_lines(data: str | Path | None) -> tuple[CalibrationLine, ...]:
    """Read a JSONL file and look at every picture; blank lines are skipped.

    Args:
        data: The file; None for the bundled set.

    Raises:
        UsageError: The file cannot be read, or holds no line.
        InputError: A line or its picture cannot be used.
    """
    if data is None:
        from visprune.demo import CALIBRATION

        data = CALIBRATION
    path = Path(data)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"The calibration file {path} cannot be read: {error.strerror}.", "Check the path."
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"The calibration file {path} is not text in UTF-8.", _FORM) from None
    lines = [
        _line(line, path, f"Line {number} of {path}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise UsageError(f"The calibration file {path} is empty.", _FORM)
    return tuple(lines)


def draw_lines(lines: Sequence[CalibrationLine], count: int | None, seed: int) -> tuple[CalibrationLine, ...]:
    """Some of the lines, drawn with a seed and kept in the file's order; all of them if `count` is None.

    Raises:
        UsageError: There are not so many.
    """
    if count is None:
        return tuple(lines)
    if not 1 <= count <= len(lines):
        raise UsageError(
            f"{count} samples were asked for, and the calibration file has {len(lines)}.",
            f"Give a number from 1 to {len(lines)}, or leave it out to use all.",
        )
    drawn = np.random.default_rng(seed).permutation(len(lines))[:count]
    return tuple(lines[index] for index in sorted(drawn))


def _line(text: str, path: Path, where: str) -> CalibrationLine:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not JSON.", _FORM) from None
    if not isinstance(data, dict):
        raise InputError(f"{where} is not a JSON object.", _FORM)
    for key in ("image", "prompt"):
        if key not in data:
            raise InputError(f"{where} has no {key!r}.", _FORM)
        if not isinstance(data[key], str) or not data[key].strip():
            raise InputError(f"{where}: {key!r} is not a text.", _FORM)
    image = path.parent / data["image"]
    try:
        decode(image)
    except InputError as error:
        raise InputError(f"{where}: {error.what}", error.hint) from None
    return CalibrationLine(where, image, data["prompt"])
