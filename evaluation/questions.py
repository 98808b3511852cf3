"""Questions about images with known answers, and the JSONL file that holds them.

A line is one question, with the path of its image below the file's folder:

    {"image": "cat.png", "question": "What is in the picture?", "answers": ["cat"]}
    {"image": "cat.png", "question": "Which is it?", "choices": ["a dog", "a cat"], "answers": ["B"]}

A line that cannot be used is left out, and reported. This module knows no metric.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visprune.errors import InputError, UsageError
from visprune.evaluation.answer_text import letters
from visprune.records import sha256
from visprune.runtime.samples import picture_in_line, read_lines

__all__ = [
    "FORM",
    "Question",
    "Questions",
    "Reading",
    "answers_of",
    "check",
    "field_of",
    "path_below",
    "question_or_problem",
    "read_jsonl",
]

FORM = 'Write a line for each: {"image": "cat.png", "question": "What is it?", "answers": ["cat"]}'
_MOST_CHOICES = 26


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        key: Its name, unique within its data.
        where: Its place in the data, for messages.
        image: Path of its image, or the bytes of an image file.
        text: The question itself.
        answers: The right answers, at least one. If several people were asked, the answer of each.
        choices: The choices of a multiple-choice question, else empty. The answers are then letters from A.
    """

    key: str
    where: str
    image: Path | bytes
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()

    def prompt(self, instruction: str) -> str:
        """Return the prompt: the question, its choices and the instruction, each on a line."""
        lines = [
            f"{letter}. {choice}" for letter, choice in zip(letters(self.choices), self.choices, strict=True)
        ]
        return "\n".join([self.text, *lines, *([instruction] if instruction else [])])


Reading = Iterable[Question | str]
"""Questions, and a sentence for each that cannot be used."""


@dataclass(frozen=True, slots=True)
class Questions:
    """A set of questions.

    Attributes:
        name: Name of the data, for people.
        usable: The questions that can be asked.
        metric: Name of the metric that judges the answers.
        instruction: A line to put after each question; empty for none.
        skipped: A sentence for each question that cannot be used.
    """

    name: str
    usable: tuple[Question, ...]
    metric: str = "exact"
    instruction: str = ""
    skipped: tuple[str, ...] = field(default=(), repr=False)

    def digest(self) -> str:
        """Return the SHA-256 of all questions: texts, answers, choices, and the content of the images."""
        of_file = functools.cache(sha256)
        digest = hashlib.sha256()
        for question in self.usable:
            image = question.image
            picture = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else of_file(image)
            line = [question.key, question.text, question.answers, question.choices, picture]
            digest.update(json.dumps(line).encode())
        return digest.hexdigest()


def question_or_problem(question: Question) -> Question | str:
    """Return the question, or a sentence that says why it cannot be used."""
    if not question.text.strip():
        return f"{question.where} asks nothing."
    # Not `Path.is_file`, which raises for names that no file system accepts.
    if isinstance(question.image, Path) and not os.path.isfile(question.image):  # noqa: PTH113
        return f"{question.where}: there is no picture at {question.image}."
    if question.choices:
        known = letters(question.choices)
        if not 2 <= len(question.choices) <= _MOST_CHOICES:
            return f"{question.where} has {len(question.choices)} choices, not 2 to {_MOST_CHOICES}."
        if wrong := [answer for answer in question.answers if answer not in tuple(known)]:
            return f"{question.where}: the answer {wrong[0]!r} is none of the letters {', '.join(known)}."
    return question


def read_jsonl(path: Path, images: Path | None = None) -> Iterator[Question | str]:
    """Yield the questions of a JSONL file, and a sentence for each unusable line; skip blank lines.

    Args:
        path: The file.
        images: The folder of the images; by default the file's own.

    Raises:
        UsageError: The file cannot be read, or has no line.
    """
    for number, line in read_lines(path, "data file", FORM):
        where = f"Line {number} of {path}"
        try:
            yield question_or_problem(_question(line, str(number), where, images or path.parent))
        except InputError as error:
            yield error.what


def _question(line: str, key: str, where: str, folder: Path) -> Question:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not JSON.", FORM) from None
    if not isinstance(data, dict):
        raise InputError(f"{where} is not a JSON object.", FORM)
    image, text = (field_of(data, name, str, where) for name in ("image", "question"))
    choices = answers_of(data, "choices", where) if "choices" in data else ()
    picture = picture_in_line(image, folder, where)
    if isinstance(picture, Path):
        picture = path_below(folder, image, where)
    return Question(key, where, picture, text, answers_of(data, "answers", where), choices)


def path_below(folder: Path, name: str, where: str) -> Path:
    """Return the path of an image below a folder. Links there may lead elsewhere, the name itself may not.

    Raises:
        InputError: The path would lie outside the folder.
    """
    path = Path(os.path.normpath(folder.absolute() / name))
    if "\0" in name or not path.is_relative_to(os.path.normpath(folder.absolute())):
        raise InputError(
            f"{where} names a picture outside {folder}: {name!r}.", "Name its folder with --images."
        )
    return folder / name


def field_of(data: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """Return a field of a record, which must be of a type.

    Raises:
        InputError: The field is missing, of another type, or an empty text.
    """
    if name not in data:
        raise InputError(f"{where} has no {name!r}.", FORM)
    if type(data[name]) is not kind or (kind is str and not data[name].strip()):
        raise InputError(f"{where}: {name!r} is not {_KINDS[kind]}.", FORM)
    return data[name]


_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def answers_of(data: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """Return the texts in a field that is a text or a list of at least one text.

    Raises:
        InputError: The field is missing or something else.
    """
    found = data.get(name)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} has no {name!r} that is a text or a list of texts.", FORM)
    return tuple(texts)


def check(questions: Questions, *, strict: bool) -> None:
    """Refuse data in which no question is usable or, if strict, in which one is not.

    Raises:
        UsageError: There is no question.
        InputError: A question was left out, and `strict` is set or none is left.
    """
    if questions.skipped and (strict or not questions.usable):
        more = f" (and {len(questions.skipped) - 1} more)" if len(questions.skipped) > 1 else ""
        lenient = ", or leave such lines out without --strict" if questions.usable else ""
        raise InputError(f"{questions.skipped[0]}{more}", f"Correct the data{lenient}.")
    if not questions.usable:
        raise UsageError(f"{questions.name} has no question.", FORM)
