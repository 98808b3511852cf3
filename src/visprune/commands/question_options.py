"""Options that name questions with known answers, shared by `visprune eval` and `visprune bench --sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.terminal import note

if TYPE_CHECKING:
    from visprune.evaluation.formats import Files
    from visprune.evaluation.questions import Questions

__all__ = [
    "QUESTION_LINE",
    "Annotations",
    "Format",
    "ImageFolder",
    "Instruction",
    "Metric",
    "Split",
    "read_data",
]

QUESTION_LINE = '{"image": path, "question": text, "answers": \\[text]}'
"""A line of a data file, for help texts; the bracket is escaped because help texts are rich markup."""

_LISTED = 10  # skipped questions that are listed on the terminal

Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Format of the data: jsonl, vqav2, gqa, textvqa, pope, scienceqa or mmbench.",
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="For vqav2 its annotations, for scienceqa its pid_splits.json."),
]
ImageFolder = Annotated[
    Path | None, typer.Option("--images", metavar="DIR", help="The folder of the data's images.")
]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="For scienceqa: the split to ask.", show_default="test")
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How answers are judged: exact, vqa, yes-no or choice.",
        show_default="the format's",
    ),
]
Instruction = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="A line after each question of the data.", show_default="the format's"),
]


def read_data(files: Files, form: str, metric: str | None, instruction: str | None) -> Questions:
    """Read the questions that the options name, and list on stderr those that cannot be used.

    Raises:
        UsageError: As for `visprune.evaluation.read_questions`.
    """
    from visprune.evaluation.formats import read_questions

    questions = read_questions(files, form, metric, instruction)
    for line in questions.skipped[:_LISTED]:
        note(f"skipped: {line}")
    if len(questions.skipped) > _LISTED:
        note(f"skipped: {len(questions.skipped) - _LISTED} more")
    return questions
