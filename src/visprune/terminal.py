"""Output of the commands: results go to stdout; notes and progress go to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["bars", "busy", "note", "print_json"]


def note(text: str) -> None:
    """Print a line for people on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(data: Any, *, lines: bool = False) -> None:
    """Print a JSON value on stdout, on a single line if `lines`."""
    print(json.dumps(data, ensure_ascii=False, indent=None if lines else 2), flush=True)


@contextmanager
def busy(text: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner while the block runs, if stderr is a terminal; yield a function that sets its text."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield status.update


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of steps on stderr; yield a function that takes a step's name, work done and total.

    On a terminal each step has a bar. Elsewhere each step is a line, so that a log shows where the work is.
    """
    stream = sys.stderr  # a step may redirect it to silence a library
    if stream is None:  # it was closed
        yield lambda *_: None
        return
    if not stream.isatty():
        seen: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen.add(what)
                print(f"{what} ...", file=stream, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        first = progress.add_task("starting", total=None)

        def update(what: str, done: int, total: int) -> None:
            progress.update(first, visible=False)
            if what not in tasks:  # work done before the first call must not count for the speed
                tasks[what] = progress.add_task(what, total=total, completed=done)
            progress.update(tasks[what], completed=done, total=total)

        yield update
