"""What is asked: questions about pictures with known answers, and the JSONL form of them.

A line is one question, with its picture's path below the file's folder:

    {"image": "cat.png", "question": "What is in the picture?", "answers": ["cat"]}
    {"image": "cat.png", "question": "Which is it?", "choices": ["a dog", "a cat"], "answers": ["B"]}

A line that cannot be used is named and left out. This file knows no metric.
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
    "inside",
    "read_jsonl",
    "usable",
]

FORM = 'Write a line for each: {"image": "cat.png", "question": "What is it?", "answers": ["cat"]}'
_MOST_CHOICES = 26


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        key: Its name in its data, of which there is one.
        where: The place it stands at, for messages.
        image: The picture: a path, or the bytes of a file.
        text: What is asked.
        answers: What is right: one or several; of people who were asked, the answer of each.
        choices: What there is to choose from, where that is so; the answer is then a letter from A on.
    """

    key: str
    where: str
    image: Path | bytes
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()

    def prompt(self, instruction: str) -> str:
        """What the model is told: the question, its choices, and the instruction, each on a line."""
        lines = [
            f"{letter}. {choice}" for letter, choice in zip(letters(self.choices), self.choices, strict=True)
        ]
        return "\n".join([self.text, *lines, *([instruction] if instruction else [])])


Reading = Iterable[Question | str]
"""Questions, and a sentence for each that cannot be used."""


@dataclass(frozen=True, slots=True)
class Questions:
    """All that is asked.

    Attributes:
        name: Of the data, for people.
        usable: The questions.
        metric: Name of what judges the answers.
        instruction: Put after each question, on a line of its own; empty for none.
        skipped: A sentence for each question that cannot be used.
    """

    name: str
    usable: tuple[Question, ...]
    metric: str = "exact"
    instruction: str = ""
    skipped: tuple[str, ...] = field(default=(), repr=False)

    def digest(self) -> str:
        """SHA-256 of all that is asked: texts, answers, and the content of the pictures."""
        of_file = functools.cache(sha256)
        digest = hashlib.sha256()
        for question in self.usable:
            image = question.image
            picture = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else of_file(image)
            line = [question.key, question.text, question.answers, question.choices, picture]
            digest.update(json.dumps(line).encode())
        return digest.hexdigest()


def usable(question: Question) -> Question | str:
    """The question, or why it cannot be used."""
    if not question.text.strip():
        return f"{question.where} asks nothing."
    # Not by `Path.is_file`, which fails on what no system takes for a name.
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
    """The questions of a JSONL file; blank lines are skipped.

    Args:
        path: The file.
        images: The folder of the pictures, if it is not the file's.

    Raises:
        UsageError: The file cannot be read, or has no line.
    """
    for number, line in read_lines(path, "data file", FORM):
        where = f"Line {number} of {path}"
        try:
            yield usable(_question(line, str(number), where, images or path.parent))
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
        picture = inside(folder, image, where)
    return Question(key, where, picture, text, answers_of(data, "answers", where), choices)


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of a picture below a folder. Links in it may lead elsewhere; the name may not.

    Raises:
        InputError: It would lie outside.
    """
    path = Path(os.path.normpath(folder.absolute() / name))
    if "\0" in name or not path.is_relative_to(os.path.normpath(folder.absolute())):
        raise InputError(
            f"{where} names a picture outside {folder}: {name!r}.", "Name its folder with --images."
        )
    return folder / name


def field_of(data: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a record, which must be of a kind.

    Raises:
        InputError: It is not there, or of another kind.
    """
    if name not in data:
        raise InputError(f"{where} has no {name!r}.", FORM)
    if type(data[name]) is not kind or (kind is str and not data[name].strip()):
        raise InputError(f"{where}: {name!r} is not {_KINDS[kind]}.", FORM)
    return data[name]


_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def answers_of(data: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A field that is a text, or a list of at least one.

    Raises:
        InputError: It is something else.
    """
    found = data.get(name)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} has no {name!r} that is a text or a list of texts.", FORM)
    return tuple(texts)


def check(questions: Questions, *, strict: bool) -> None:
    """Refuse data of which nothing can be asked, or, if strict, of which something cannot.

    Raises:
        UsageError: There is no question.
        InputError: One was left out, and that is not allowed.
    """
    if questions.skipped and (strict or not questions.usable):
        more = f" (and {len(questions.skipped) - 1} more)" if len(questions.skipped) > 1 else ""
        lenient = ", or leave such lines out without --strict" if questions.usable else ""
        raise InputError(f"{questions.skipped[0]}{more}", f"Mend the data{lenient}.")
    if not questions.usable:
        raise UsageError(f"{questions.name} has no question.", FORM)
