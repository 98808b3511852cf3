"""The formats of common published sets, read from files that the user has. Nothing is downloaded.

| format    | --data                    | --annotations    | --images                                  |
|-----------|---------------------------|------------------|-------------------------------------------|
| jsonl     | lines, see `questions`    |                  | the file's folder, by default             |
| vqav2     | questions JSON            | annotations JSON | COCO_val2014_000000000042.jpg, ...        |
| gqa       | questions JSON            |                  | IMAGEID.jpg                               |
| textvqa   | TextVQA JSON              |                  | IMAGE_ID.jpg                              |
| pope      | JSONL                     |                  | the names in the file                     |
| scienceqa | problems.json             | pid_splits.json  | SPLIT/PROBLEM/image.png                   |
| mmbench   | TSV, the pictures in it   |                  |                                           |

A format is one function in `published` and one line in `FORMATS`. A record that cannot be used is left out,
and reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from visprune.errors import UsageError
from visprune.evaluation import published
from visprune.evaluation.metrics import metric_named
from visprune.evaluation.question_files import Files, format_hint
from visprune.evaluation.questions import Question, Questions, Reading, read_jsonl
from visprune.names import lookup

__all__ = ["FORMATS", "Files", "Format", "read_questions"]

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, slots=True)
class Format:
    """One published format.

    Attributes:
        read: Reads the questions in its files.
        metric: Name of the metric that the set is published with.
        instruction: The line that LLaVA 1.5 was evaluated with after each of its questions.
        needs: Options that must be given besides the data.
        may: Options that may be given.
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
"""Name -> format."""


def read_questions(
    files: Files | str | Path, form: str = "jsonl", metric: str | None = None, instruction: str | None = None
) -> Questions:
    """Read a set of questions.

    Args:
        files: The files of the set; a path alone is its data.
        form: Name of its format, a key of `FORMATS`.
        metric: Name of the metric that judges the answers; by default the format's.
        instruction: A line to put after each question; by default the format's.

    Raises:
        UsageError: There is no such format or metric; an option is missing or of no use for the format; or
            a file cannot be read or has another format.
    """
    files = files if isinstance(files, Files) else Files(Path(files))
    chosen = lookup(form, FORMATS, "format")
    for option in ("annotations", "images", "split"):
        given = getattr(files, option) is not None
        if option in chosen.needs and not given:
            raise UsageError(f"The format {form} needs --{option}.", format_hint(form))
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
