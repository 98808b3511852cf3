"""The readers of published sets: each gives the questions in its files, and says which cannot be used."""

from __future__ import annotations

import base64
import csv
import json
from typing import Any

from visprune.errors import InputError
from visprune.evaluation.question_files import Files, cannot_read, each, form_of, not_that, part, read_json
from visprune.evaluation.questions import (
    Question,
    Reading,
    answers_of,
    field_of,
    inside,
    usable,
)
from visprune.names import lookup
from visprune.runtime.samples import read_lines

__all__ = ["gqa", "mmbench", "pope", "scienceqa", "textvqa", "vqav2"]

_LARGEST_FIELD = 1 << 28  # of a TSV: a picture in base64
_OPTIONS = ("A", "B", "C", "D", "E")


def vqav2(files: Files) -> Reading:
    """VQAv2 (Goyal et al., CVPR 2017): questions and annotations; pictures are COCO's."""
    asked = read_json(files.data, "vqav2", dict)
    subtype = part(asked, "data_subtype", str, files.data, "vqav2")
    beside = part(read_json(files.beside, "vqav2", dict), "annotations", list, files.beside, "vqav2")
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

    yield from each(part(asked, "questions", list, files.data, "vqav2"), files.data, read)


def gqa(files: Files) -> Reading:
    """GQA (Hudson and Manning, CVPR 2019): an object of questions by their ids."""

    def read(item: dict[str, Any], where: str) -> Question:
        name = f"{field_of(item, 'imageId', str, where)}.jpg"
        text = field_of(item, "question", str, where)
        return Question(
            item["key"], where, inside(files.folder, name, where), text, answers_of(item, "answer", where)
        )

    found = read_json(files.data, "gqa", dict)
    items = [{**item, "key": key} if isinstance(item, dict) else item for key, item in found.items()]
    yield from each(items, files.data, read)


def textvqa(files: Files) -> Reading:
    """TextVQA (Singh et al., CVPR 2019)."""

    def read(item: dict[str, Any], where: str) -> Question:
        key = field_of(item, "question_id", int, where)
        name = f"{field_of(item, 'image_id', str, where)}.jpg"
        text = field_of(item, "question", str, where)
        return Question(
            str(key), where, inside(files.folder, name, where), text, answers_of(item, "answers", where)
        )

    found = part(read_json(files.data, "textvqa", dict), "data", list, files.data, "textvqa")
    yield from each(found, files.data, read)


def pope(files: Files) -> Reading:
    """POPE (Li et al., EMNLP 2023): a line for each question."""
    for number, line in read_lines(files.data, "data file", form_of("pope")):
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


def scienceqa(files: Files) -> Reading:
    """ScienceQA (Lu et al., NeurIPS 2022): the problems of a split that have a picture."""
    splits = read_json(files.beside, "scienceqa", dict)
    split = files.split or "test"
    lookup(split, splits, "split")
    problems = read_json(files.data, "scienceqa", dict)

    def read(item: dict[str, Any], where: str) -> Question:
        choices = answers_of(item, "choices", where)
        index = field_of(item, "answer", int, where)
        if not 0 <= index < len(choices):
            raise InputError(
                f"{where}: the answer {index} is none of {len(choices)} choices.", form_of("scienceqa")
            )
        text = field_of(item, "question", str, where)
        hint = item.get("hint")
        text = f"{hint}\n{text}" if isinstance(hint, str) and hint.strip() else text
        name = f"{item['folder']}/{item['key']}/{field_of(item, 'image', str, where)}"
        return Question(
            item["key"], where, inside(files.folder, name, where), text, (chr(ord("A") + index),), choices
        )

    found = []
    for key in part(splits, split, list, files.beside, "scienceqa"):
        problem = problems.get(str(key))
        if not isinstance(problem, dict):
            yield f"The problem {key} is not in {files.data}."
        elif problem.get("image"):  # those without a picture are no questions about pictures
            # A split such as minival is a part of another one, where its pictures lie.
            found.append(
                {"folder": split, **problem, "key": str(key)} | {"folder": problem.get("split", split)}
            )
    yield from each(found, files.data, read)


def mmbench(files: Files) -> Reading:
    """MMBench (Liu et al., ECCV 2024): a TSV with the pictures in it."""
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
                raise InputError(f"{where}: 'image' is not base64.", form_of("mmbench")) from None
        picture = pictures[content if content in pictures else key]
        return Question(key, where, picture, text, answers_of(row, "answer", where), choices)

    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    try:
        with files.data.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            if missing := {"index", "question", "image", "A", "B"} - set(rows.fieldnames or ()):
                raise not_that(files.data, "mmbench", f"it has no column {min(missing)!r}")
            for row in rows:
                yield from each([dict(row)], files.data, read, f"Line {rows.line_num} of {files.data}")
    except OSError as error:
        raise cannot_read(files.data, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise not_that(files.data, "mmbench", str(error)) from None


def _filled(cell: Any) -> bool:
    return isinstance(cell, str) and cell.strip() not in ("", "nan")
