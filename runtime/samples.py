"""Calibration samples: lines of {"image": path, "prompt": text}, with image paths relative to the file.

An image may also be a `data:` URL. The whole file is checked before a model is loaded, and an error names the
number of the line. If a share of unreadable images is allowed, those lines are left out and listed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visprune.errors import InputError, UsageError
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.sources import locate

__all__ = ["Sample", "Samples", "draw_samples", "picture_in_line", "read_lines", "read_samples"]

_FORM = 'Write a line for each sample: {"image": "cat.png", "prompt": "What is in the picture?"}'


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample.

    Attributes:
        where: File and line, for errors.
        image: Path of the image, or the bytes of an image file.
        prompt: The user's message.
    """

    where: str
    image: Path | bytes
    prompt: str


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples that can be used, and a sentence for each one that was left out."""

    usable: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()


def read_samples(data: str | Path | None, *, max_skipped: float = 0.0) -> Samples:
    """Read a JSONL file and decode every image to check it. Blank lines are skipped.

    Args:
        data: The file; None for the bundled set.
        max_skipped: Largest fraction of lines that may be left out because their images cannot be read.

    Raises:
        UsageError: The file cannot be read, or is empty.
        InputError: A line cannot be used, or too many images cannot be read.
    """
    if data is None:
        from visprune.bundled import CALIBRATION

        data = CALIBRATION
    path = Path(data)
    lines = [
        _sample(line, path, f"Line {number} of {path}")
        for number, line in read_lines(path, "calibration file", _FORM)
    ]
    usable, unreadable = [], []
    for sample in lines:
        try:
            decode(sample.image)
            usable.append(sample)
        except InputError as error:
            unreadable.append(InputError(f"{sample.where}: {error.what}", error.hint))
    if len(unreadable) > max_skipped * len(lines) or not usable:
        first, count = unreadable[0], len(unreadable)
        if count == 1 or not max_skipped:
            raise first
        raise InputError(
            f"{count} of {len(lines)} pictures of {path} cannot be read, and at most {max_skipped:.0%} may "
            f"be left out. The first: {first.what}",
            "Correct the file, or allow more with --max-skipped.",
        )
    return Samples(tuple(usable), tuple(error.what for error in unreadable))


def read_lines(path: Path, kind: str, form: str) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, each with its number, counted from 1.

    Args:
        path: The file.
        kind: Name of this kind of file, for messages.
        form: Sentence that says how to write such a file, for messages.

    Raises:
        UsageError: The file cannot be read, or all of its lines are blank.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"The {kind} {path} cannot be read: {error.strerror}.", "Check the path.") from None
    except UnicodeDecodeError:
        raise UsageError(f"The {kind} {path} is not text in UTF-8.", form) from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"The {kind} {path} is empty.", form)
    return lines


def draw_samples(samples: Sequence[Sample], count: int | None, seed: int) -> tuple[Sample, ...]:
    """Draw samples at random, and return them in the file's order; all of them if `count` is None.

    Raises:
        UsageError: The count is below 1, or larger than the number of samples.
    """
    if count is None:
        return tuple(samples)
    if not 1 <= count <= len(samples):
        raise UsageError(
            f"{count} samples were asked for, and the calibration file has {len(samples)}.",
            f"Give a number from 1 to {len(samples)}, or leave it out to use all.",
        )
    drawn = np.random.default_rng(seed).permutation(len(samples))[:count]
    return tuple(samples[index] for index in sorted(drawn))


def _sample(text: str, path: Path, where: str) -> Sample:
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
    return Sample(where, picture_in_line(data["image"], path.parent, where), data["prompt"])


def picture_in_line(text: str, folder: Path, where: str) -> Path | bytes:
    """Return the image that a line names: a path in `folder`, or the bytes of a `data:` URL.

    Args:
        text: Path or `data:` URL, as it stands in the line.
        folder: Directory that the path is relative to.
        where: File and line, for errors.

    Raises:
        InputError: The text is another URL, or a damaged `data:` URL.
    """
    try:
        image = locate(text)
    except InputError as error:
        raise InputError(f"{where}: {error.what}", error.hint) from None
    return image if isinstance(image, bytes) else folder / image
