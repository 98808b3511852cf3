"""The published forms of common sets, read from files that the user has. Nothing is downloaded.

| format    | --data                    | --annotations    | --images                                  |
|-----------|---------------------------|------------------|-------------------------------------------|
| jsonl     | lines, see `questions`    |                  | the file's folder, by default             |
| vqav2     | questions JSON            | annotations JSON | COCO_val2014_000000000042.jpg, ...        |
| gqa       | questions JSON            |                  | IMAGEID.jpg                               |
| textvqa   | TextVQA JSON              |                  | IMAGE_ID.jpg                              |
| pope      | JSONL                     |                  | the names in the file                     |
| scienceqa | problems.json             | pid_splits.json  | SPLIT/PROBLEM/image.png                   |
| mmbench   | TSV, the pictures in it   |                  |                                           |

A format is one function and one line in `FORMATS`. Records that cannot be used are named and left out.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visprune.bench.evaluation.metrics import metric_named
from visprune.bench.evaluation.names import named
from visprune.bench.evaluation.questions import (
    Question,
    Questions,
    Reading,
    answers_of,
    field_of,
    inside,
    read_jsonl,
    usable,
)
from visprune.errors import InputError, UsageError
from visprune.runtime.samples import read_lines

__all__ = ["FORMATS", "Files", "Format", "read_questions"]

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_LARGEST_FIELD = 1 << 28  # of a TSV: a picture in base64
_OPTIONS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True, slots=True)
class Files:
    """Where a set is.

    Attributes:
        data: Its questions.
        annotations: Its answers, where they are in a file of their own, or its splits.
        images: The folder of its pictures.
        split: The split that is asked, of a set whose files hold several.
    """

    data: Path
    annotations: Path | None = None
    images: Path | None = None
    split: str | None = None

    @property
    def beside(self) -> Path:
        """The annotations; the format needs them."""
        assert self.annotations is not None
        return self.annotations

    @property
    def folder(self) -> Path:
        """The folder of the pictures; the format needs it."""
        assert self.images is not None
        return self.images


def _vqav2(files: Files) -> Reading:
    asked = _json(files.data, "vqav2", dict)
    subtype = _part(asked, "data_subtype", str, files.data, "vqav2")
    beside = _part(_json(files.beside, "vqav2", dict), "annotations", list, files.beside, "vqav2")
    known = {str(item.get("question_id")): item for item in beside if isinstance(item, dict)}

    def read(item: dict[str, Any], where: str) -> Question:
        key = str(field_of(item, "question_id", int, where))
        if key not in known:
            raise InputError(
                f"{where}: the question {key} is not in {files.beside}.", "Take files of one split."
            )
        answers = field_of(known[key], "answers", list, f"The question {key} of {files.beside}")
        texts = {
            "answers": [
                answer["answer"] for answer in answers if isinstance(answer, dict) and "answer" in answer
            ]
        }
        name = f"COCO_{subtype}_{field_of(item, 'image_id', int, where):012}.jpg"
        text = field_of(item, "question", str, where)
        return Question(
            key, where, inside(files.folder, name, where), text, answers_of(texts, "answers", where)
        )

    yield from _each(_part(asked, "questions", list, files.data, "vqav2"), files.data, read)


def _gqa(files: Files) -> Reading:
    def read(item: dict[str, Any], where: str) -> Question:
        name = f"{field_of(item, 'imageId', str, where)}.jpg"
        text = field_of(item, "question", str, where)
        return Question(
            item["key"], where, inside(files.folder, name, where), text, answers_of(item, "answer", where)
        )

    found = _json(files.data, "gqa", dict)
    items = [{**item, "key": key} if isinstance(item, dict) else item for key, item in found.items()]
    yield from _each(items, files.data, read)


def _textvqa(files: Files) -> Reading:
    def read(item: dict[str, Any], where: str) -> Question:
        key = field_of(item, "question_id", int, where)
        name = f"{field_of(item, 'image_id', str, where)}.jpg"
        text = field_of(item, "question", str, where)
        return Question(
            str(key), where, inside(files.folder, name, where), text, answers_of(item, "answers", where)
        )

    found = _part(_json(files.data, "textvqa", dict), "data", list, files.data, "textvqa")
    yield from _each(found, files.data, read)


def _pope(files: Files) -> Reading:
    for number, line in read_lines(files.data, "data file", _form("pope")):
        where = f"Line {number} of {files.data}"
        try:
            item = json.loads(line)
            if not isinstance(item, dict):
                raise ValueError
            name, text = (field_of(item, field, str, where) for field in ("image", "text"))
            label = answers_of(item, "label", where)
            yield usable(Question(str(number), where, inside(files.folder, name, where), text, label))
        except InputError as error:
            yield error.what
        except (ValueError, RecursionError):
            yield f"{where} is not a JSON object."


def _scienceqa(files: Files) -> Reading:
    splits = _json(files.beside, "scienceqa", dict)
    split = files.split or "test"
    named(split, splits, "split")
    problems = _json(files.data, "scienceqa", dict)

    def read(item: dict[str, Any], where: str) -> Question:
        choices = answers_of(item, "choices", where)
        index = field_of(item, "answer", int, where)
        if not 0 <= index < len(choices):
            raise InputError(
                f"{where}: the answer {index} is none of {len(choices)} choices.", _form("scienceqa")
            )
        text = field_of(item, "question", str, where)
        hint = item.get("hint")
        text = f"{hint}\n{text}" if isinstance(hint, str) and hint.strip() else text
        name = f"{item['folder']}/{item['key']}/{field_of(item, 'image', str, where)}"
        return Question(
            item["key"], where, inside(files.folder, name, where), text, (chr(ord("A") + index),), choices
        )

    found = []
    for key in _part(splits, split, list, files.beside, "scienceqa"):
        problem = problems.get(str(key))
        if not isinstance(problem, dict):
            yield f"The problem {key} is not in {files.data}."
        elif problem.get("image"):  # those without a picture are no questions about pictures
            # A split such as minival is a part of another one, where its pictures lie.
            found.append(
                {"folder": split, **problem, "key": str(key)} | {"folder": problem.get("split", split)}
            )
    yield from _each(found, files.data, read)


def _mmbench(files: Files) -> Reading:
    pictures: dict[str, bytes] = {}

    def read(row: dict[str, Any], where: str) -> Question:
        key = field_of(row, "index", str, where)
        choices = tuple(row[option] for option in _OPTIONS if _filled(row.get(option)))
        text = field_of(row, "question", str, where)
        text = f"{row['hint']}\n{text}" if _filled(row.get("hint")) else text
        content = field_of(row, "image", str, where)
        # A question asked again with its choices in another order names the row of its picture.
        if content not in pictures:
            try:
                pictures[key] = base64.b64decode(content, validate=True)
            except ValueError:
                raise InputError(f"{where}: 'image' is not base64.", _form("mmbench")) from None
        picture = pictures[content if content in pictures else key]
        return Question(key, where, picture, text, answers_of(row, "answer", where), choices)

    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    try:
        with files.data.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            if missing := {"index", "question", "image", "A", "B"} - set(rows.fieldnames or ()):
                raise _not_that(files.data, "mmbench", f"it has no column {min(missing)!r}")
            for row in rows:
                yield from _each([dict(row)], files.data, read, f"Line {rows.line_num} of {files.data}")
    except OSError as error:
        raise _cannot_read(files.data, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise _not_that(files.data, "mmbench", str(error)) from None


def _filled(cell: Any) -> bool:
    return isinstance(cell, str) and cell.strip() not in ("", "nan")


def _each(
    items: list[Any], path: Path, read: Callable[[dict[str, Any], str], Question], where: str | None = None
) -> Iterator[Question | str]:
    """Each record as a question, or why it is none."""
    for number, item in enumerate(items, 1):
        place = where or f"Entry {number} of {path}"
        if not isinstance(item, dict):
            yield f"{place} is not an object."
            continue
        try:
            yield usable(read(item, place))
        except InputError as error:
            yield error.what


@dataclass(frozen=True, slots=True)
class Format:
    """A published form.

    Attributes:
        read: The questions in its files.
        metric: What it is judged by, as published.
        instruction: What LLaVA 1.5 is told after each of its questions.
        needs: The files it has beside the data.
        may: Those it may have.
    """

    read: Callable[[Files], Reading]
    metric: str = "exact"
    instruction: str = ""
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


FORMATS = {
    "jsonl": Format(lambda files: read_jsonl(files.data, files.images), may=("images",)),
    "vqav2": Format(_vqav2, "vqa", _SHORT, ("annotations", "images")),
    "gqa": Format(_gqa, "exact", _SHORT, ("images",)),
    "textvqa": Format(_textvqa, "vqa", _SHORT, ("images",)),
    "pope": Format(_pope, "yes-no", _SHORT, ("images",)),
    "scienceqa": Format(_scienceqa, "choice", _LETTER, ("annotations", "images"), ("split",)),
    "mmbench": Format(_mmbench, "choice", _LETTER),
}


def read_questions(
    files: Files | str | Path, form: str = "jsonl", metric: str | None = None, instruction: str | None = None
) -> Questions:
    """Read a set.

    Args:
        files: Where it is; a path alone is that of its data.
        form: A name in `FORMATS`.
        metric: What judges the answers; by default what the form is judged by.
        instruction: Put after each question; by default the form's own.

    Raises:
        UsageError: No such form or metric, a file that it needs or has no use for, a file that cannot be
            read or has another form.
    """
    files = files if isinstance(files, Files) else Files(Path(files))
    chosen = named(form, FORMATS, "format")
    for option in ("annotations", "images", "split"):
        given = getattr(files, option) is not None
        if option in chosen.needs and not given:
            raise UsageError(f"The format {form} needs --{option}.", _form(form))
        if given and option not in (*chosen.needs, *chosen.may):
            raise UsageError(f"The format {form} has no use for --{option}.", "Leave it out.")
    judge = metric_named(metric or chosen.metric)
    found: dict[str, Question] = {}
    skipped = []
    for item in chosen.read(files):
        problem = item if isinstance(item, str) else judge.problem(item)
        if not problem and not isinstance(item, str) and item.key in found:
            problem = f"{item.where}: there is a question {item.key} already."
        if problem:
            skipped.append(problem)
        elif not isinstance(item, str):
            found[item.key] = item
    told = chosen.instruction if instruction is None else instruction
    return Questions(str(files.data), tuple(found.values()), judge.name, told.strip(), tuple(skipped))


def _json(path: Path, form: str, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _cannot_read(path, error) from None
    except (ValueError, RecursionError):
        raise _not_that(path, form, "it is not JSON") from None
    if type(found) is not kind:
        raise _not_that(path, form, f"it holds a {type(found).__name__}")
    return found


def _part(data: dict[str, Any], name: str, kind: type, path: Path, form: str) -> Any:
    if type(data.get(name)) is not kind:
        raise _not_that(path, form, f"it has no {kind.__name__} {name!r}")
    return data[name]


def _not_that(path: Path, form: str, why: str) -> UsageError:
    return UsageError(f"{path} does not have the form of {form}: {why}.", _form(form))


def _cannot_read(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path} cannot be read: {error.strerror}.", "Check the path.")


def _form(form: str) -> str:
    options = " ".join(f"--{option} {option.upper()}" for option in FORMATS[form].needs)
    command = f"visprune-eval BUNDLE --data FILE --format {form} {options}".rstrip()
    return f"Give the set's own files, as in: {command}"
