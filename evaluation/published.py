"""Readers of published sets: each yields questions, and a sentence for each record that cannot be used."""

from __future__ import annotations

import base64
import csv
import json
from typing import Any

from visprune.errors import InputError
from visprune.evaluation.question_files import (
    Files,
    cannot_read,
    format_hint,
    read_json,
    read_records,
    required_field,
    wrong_format,
)
from visprune.evaluation.questions import (
    Question,
    Reading,
    answers_of,
    field_of,
    path_below,
    question_or_problem,
)
from visprune.names import lookup
from visprune.runtime.samples import read_lines

__all__ = ["gqa", "mmbench", "pope", "scienceqa", "textvqa", "vqav2"]

_LARGEST_FIELD = 1 << 28  # characters of a field of a TSV, which holds an image in base64
_OPTIONS = ("A", "B", "C", "D", "E")


def vqav2(files: Files) -> Reading:
    """Read VQAv2 (Goyal et al., CVPR 2017): questions and annotations; the images are COCO's."""
    asked = read_json(files.data, "vqav2", dict)
    subtype = required_field(asked, "data_subtype", str, files.data, "vqav2")
    path = files.annotations_file
    annotations = required_field(read_json(path, "vqav2", dict), "annotations", list, path, "vqav2")
    known = {str(item.get("question_id")): item for item in annotations if isinstance(item, dict)}

    def read(item: dict[str, Any], where: str) -> Question:
        key = str(field_of(item, "question_id", int, where))
        if key not in known:
            raise InputError(f"{where}: the question {key} is not in {path}.", "Use files of one split.")
        answers = field_of(known[key], "answers", list, f"The question {key} of {path}")
        texts = {
            "answers": [
                answer["answer"] for answer in answers if isinstance(answer, dict) and "answer" in answer
            ]
        }
        name = f"COCO_{subtype}_{field_of(item, 'image_id', int, where):012}.jpg"
        text = field_of(item, "question", str, where)
        return Question(
            key, where, path_below(files.folder, name, where), text, answers_of(texts, "answers", where)
        )

    yield from read_records(required_field(asked, "questions", list, files.data, "vqav2"), files.data, read)


def gqa(files: Files) -> Reading:
    """Read GQA (Hudson and Manning, CVPR 2019): an object of questions by their ids."""

    def read(item: dict[str, Any], where: str) -> Question:
        name = f"{field_of(item, 'imageId', str, where)}.jpg"
        text = field_of(item, "question", str, where)
        return Question(
            item["key"], where, path_below(files.folder, name, where), text, answers_of(item, "answer", where)
        )

    found = read_json(files.data, "gqa", dict)
    items = [{**item, "key": key} if isinstance(item, dict) else item for key, item in found.items()]
    yield from read_records(items, files.data, read)


def textvqa(files: Files) -> Reading:
    """Read TextVQA (Singh et al., CVPR 2019): an object with a list of questions."""

    def read(item: dict[str, Any], where: str) -> Question:
        key = field_of(item, "question_id", int, where)
        name = f"{field_of(item, 'image_id', str, where)}.jpg"
        text = field_of(item, "question", str, where)
        return Question(
            str(key), where, path_below(files.folder, name, where), text, answers_of(item, "answers", where)
        )

    found = required_field(read_json(files.data, "textvqa", dict), "data", list, files.data, "textvqa")
    yield from read_records(found, files.data, read)


def pope(files: Files) -> Reading:
    """Read POPE (Li et al., EMNLP 2023): a line for each question."""
    for number, line in read_lines(files.data, "data file", format_hint("pope")):
        where = f"Line {number} of {files.data}"
        try:
            item = json.loads(line)
            if not isinstance(item, dict):
                raise ValueError
            name, text = (field_of(item, field, str, where) for field in ("image", "text"))
            label = answers_of(item, "label", where)
            yield question_or_problem(
                Question(str(number), where, path_below(files.folder, name, where), text, label)
            )
        except InputError as error:
            yield error.what
        except (ValueError, RecursionError):
            yield f"{where} is not a JSON object."


def scienceqa(files: Files) -> Reading:
    """Read ScienceQA (Lu et al., NeurIPS 2022): the problems of a split that have an image."""
    splits = read_json(files.annotations_file, "scienceqa", dict)
    split = files.split or "test"
    lookup(split, splits, "split")
    problems = read_json(files.data, "scienceqa", dict)

    def read(item: dict[str, Any], where: str) -> Question:
        choices = answers_of(item, "choices", where)
        index = field_of(item, "answer", int, where)
        if not 0 <= index < len(choices):
            raise InputError(
                f"{where}: the answer {index} is none of {len(choices)} choices.", format_hint("scienceqa")
            )
        text = field_of(item, "question", str, where)
        hint = item.get("hint")
        text = f"{hint}\n{text}" if isinstance(hint, str) and hint.strip() else text
        name = f"{item['folder']}/{item['key']}/{field_of(item, 'image', str, where)}"
        return Question(
            item["key"], where, path_below(files.folder, name, where), text, (chr(ord("A") + index),), choices
        )

    found = []
    for key in required_field(splits, split, list, files.annotations_file, "scienceqa"):
        problem = problems.get(str(key))
        if not isinstance(problem, dict):
            yield f"The problem {key} is not in {files.data}."
        elif problem.get("image"):  # a problem without an image is no question about one
            # A split such as minival is part of another one, whose folder has the images.
            found.append(
                {"folder": split, **problem, "key": str(key)} | {"folder": problem.get("split", split)}
            )
    yield from read_records(found, files.data, read)


def mmbench(files: Files) -> Reading:
    """Read MMBench (Liu et al., ECCV 2024): a TSV that contains the images."""
    images: dict[str, bytes] = {}

    def read(row: dict[str, Any], where: str) -> Question:
        key = field_of(row, "index", str, where)
        choices = tuple(row[option] for option in _OPTIONS if _filled(row.get(option)))
        text = field_of(row, "question", str, where)
        text = f"{row['hint']}\n{text}" if _filled(row.get("hint")) else text
        content = field_of(row, "image", str, where)
        # A question that is repeated with its choices in another order has the index of an earlier row in
        # place of its image.
        if content not in images:
            try:
                images[key] = base64.b64decode(content, validate=True)
            except ValueError:
                raise InputError(f"{where}: 'image' is not base64.", format_hint("mmbench")) from None
        image = images[content if content in images else key]
        return Question(key, where, image, text, answers_of(row, "answer", where), choices)

    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    try:
        with files.data.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            if missing := {"index", "question", "image", "A", "B"} - set(rows.fieldnames or ()):
                raise wrong_format(files.data, "mmbench", f"it has no column {min(missing)!r}")
            for row in rows:
                yield from read_records(
                    [dict(row)], files.data, read, f"Line {rows.line_num} of {files.data}"
                )
    except OSError as error:
        raise cannot_read(files.data, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise wrong_format(files.data, "mmbench", str(error)) from None


def _filled(cell: Any) -> bool:
    return isinstance(cell, str) and cell.strip() not in ("", "nan")
