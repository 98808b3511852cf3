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

A format is one function in `published` and one line in `FORMATS`. Records that cannot be used are named and
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from visprune.errors import UsageError
from visprune.evaluation import published
from visprune.evaluation.metrics import metric_named
from visprune.evaluation.question_files import Files, form_of
from visprune.evaluation.questions import Question, Questions, Reading, read_jsonl
from visprune.names import lookup

__all__ = ["FORMATS", "Files", "Format", "read_questions"]

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


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
    "vqav2": Format(published.vqav2, "vqa", _SHORT, ("annotations", "images")),
    "gqa": Format(published.gqa, "exact", _SHORT, ("images",)),
    "textvqa": Format(published.textvqa, "vqa", _SHORT, ("images",)),
    "pope": Format(published.pope, "yes-no", _SHORT, ("images",)),
    "scienceqa": Format(published.scienceqa, "choice", _LETTER, ("annotations", "images"), ("split",)),
    "mmbench": Format(published.mmbench, "choice", _LETTER),
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
    chosen = lookup(form, FORMATS, "format")
    for option in ("annotations", "images", "split"):
        given = getattr(files, option) is not None
        if option in chosen.needs and not given:
            raise UsageError(f"The format {form} needs --{option}.", form_of(form))
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
