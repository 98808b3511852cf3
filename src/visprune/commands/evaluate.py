"""`visprune eval`: bundles are asked questions with known answers, and their answers judged and compared."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.commands.arguments import Provider, System
from visprune.commands.question_options import (
    QUESTION_LINE,
    Annotations,
    Format,
    ImageFolder,
    Instruction,
    Metric,
    Split,
    read_data,
)
from visprune.terminal import bars, note, print_json

if TYPE_CHECKING:
    from visprune.evaluation.figures import Figure
    from visprune.evaluation.summary import Evaluation, EvaluationRow

__all__ = ["evaluate"]

_WIDTH = 200  # columns of a table that goes to a file or a pipe
_INTERVALS = {
    "wilson": "Wilson",
    "bonett-price": "paired, Bonett and Price",
    "bootstrap": "bootstrap over questions",
}


def evaluate(  # noqa: PLR0913 - a command line's options
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE...", help="Bundles; DIR@RATIO asks one at another ratio.", show_default=False
        ),
    ],
    *,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help=f"Questions: lines of {QUESTION_LINE}.",
            show_default=False,
        ),
    ],
    form: Format = "jsonl",
    annotations: Annotations = None,
    images: ImageFolder = None,
    split: Split = None,
    metric: Metric = None,
    instruction: Instruction = None,
    system: System = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File of the answers; an interrupted run continues from it.",
            show_default="DATA-answers.jsonl",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 16,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Worker processes.", show_default="as many as fit")
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", help="Processor threads of each worker.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Work on the Ray cluster at RAY_ADDRESS, or that of this machine.")
    ] = False,
    provider: Provider = "cpu",
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines/--no-baselines",
            help="Ask random tokens (random) and a smaller picture (resize) too, at the bundles' counts.",
        ),
    ] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a question that cannot be used, instead of skipping it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start the file of answers anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Ask bundles questions with known answers, and compare their answers.

    Example: visprune-eval fopru@1 fopru fopru-int8 --data questions.jsonl
    """
    from visprune.bench.evaluation_rows import made_baselines
    from visprune.evaluation.answering import AnswerSettings
    from visprune.evaluation.evaluator import evaluate as run
    from visprune.evaluation.formats import Files
    from visprune.evaluation.workers import Workers

    settings = AnswerSettings(max_new_tokens, threads, provider, system)
    workers = Workers(processes, ray)
    questions = read_data(Files(data, annotations, images, split), form, metric, instruction)
    path = output if output is not None else Path(f"{data.stem}-answers.jsonl")
    unfinished = False
    try:
        with bars() as bar, made_baselines(provider, bar, ray=ray) if baselines else nullcontext() as added:

            def progress(name: str, done: int, total: int) -> None:
                nonlocal unfinished
                unfinished = unfinished or done > 0
                bar(name, done, total)

            found = run(
                bundles,
                questions,
                settings=settings,
                workers=workers,
                output=path,
                strict=strict,
                force=force,
                baselines=added,
                announce=_announce,
                progress=progress,
            )
        unfinished = False
    finally:
        if unfinished:
            note(f"The answers so far are in {path}; the same command without --force continues from them.")
    if as_json:
        print_json({"answers": str(path), **asdict(found)})
        return
    _print(found, path)


def _announce(questions: Mapping[str, int]) -> None:
    """Say on stderr how many questions each row is about to be asked."""
    rows: dict[int, list[str]] = {}
    for name, count in questions.items():
        rows.setdefault(count, []).append(name)
    each = ". ".join(f"{count} each for {'; '.join(names)}" for count, names in rows.items() if count)
    note(f"{sum(questions.values())} questions to ask: {each}")


def _print(found: Evaluation, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDTH
    names = list(dict.fromkeys(figure.name for row in found.rows for figure in row.figures))
    table = Table("bundle", "kept", "questions", *names, box=None, pad_edge=False)
    for row in found.rows:
        figures = {figure.name: _cell(figure) for figure in row.figures}
        cells = (figures.get(name, "-") for name in names)
        table.add_row(row.asked.name, f"{row.kept:.1%}", str(row.questions), *cells)
    console.print(table)
    console.print()
    if len(found.rows) > 1:
        head = (f"against {found.baseline}", f"difference of {names[0]}", "same answer")
        table = Table(*head, box=None, pad_edge=False)
        for row in found.rows:
            if row.difference is not None:
                table.add_row(row.asked.name, _signed(row.difference), _cell(row.agreement))
        console.print(table)
        console.print()
    if any(row.equal_counts for row in found.rows):
        head = ("bundle", "baseline at its budget", f"difference of {names[0]}")
        table = Table(*head, box=None, pad_edge=False)
        for row in found.rows:
            for other in row.equal_counts:
                table.add_row(row.asked.name, other.name, _signed(other.difference))
        console.print(table)
        console.print()
    used = {figure.interval: None for row in found.rows for figure in _all(row)}
    console.print(f"in brackets: 95% intervals ({'; '.join(_INTERVALS[name] for name in used)})")
    console.print(f"{found.questions} questions of {found.data}, {len(found.skipped)} skipped")
    for row in found.rows:
        if row.errors:
            console.print(
                f"{row.asked.name} could not be asked {len(row.errors)} questions; the first: {row.errors[0]}"
            )
        if row.cut:
            console.print(f"{row.asked.name}: {row.cut} answers were cut off at the limit of new tokens")
    for text in found.notes:
        console.print(text)
    console.print(f"answers in {path}")


def _all(row: EvaluationRow) -> list[Figure]:
    compared = (row.difference, row.agreement, *(other.difference for other in row.equal_counts))
    return [figure for figure in (*row.figures, *compared) if figure is not None]


def _cell(figure: Figure | None) -> str:
    return "-" if figure is None else f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def _signed(figure: Figure | None) -> str:
    return "-" if figure is None else f"{figure.value:+.3f} ({figure.low:+.3f} to {figure.high:+.3f})"
