"""`visprune methods`: a list of the pruning methods."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from visprune.terminal import print_json

__all__ = ["methods"]


@dataclass(frozen=True, slots=True)
class _Method:
    """One row of the table."""

    name: str
    place: str
    about: str
    source: str


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead.")] = False,
) -> None:
    """List the pruning methods.

    Example: visprune-methods
    """
    from visprune.pruning.registry import method_names

    rows = [_row(name) for name in method_names()]
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("method", "prunes", "what it does", "source"):
        table.add_column(title, no_wrap=title == "method")
    for row in rows:
        table.add_row(row.name, row.place, row.about, row.source)
    Console(markup=False).print(table)


def _row(name: str) -> _Method:
    from visprune.pruning.registry import load_method

    try:
        method = load_method(name)
        about = (method.__doc__ or "").strip().splitlines()
        return _Method(name, method.place, about[0] if about else "", method.paper)
    except Exception as error:  # a broken method of another package must not hide the rest
        return _Method(name, "?", f"cannot be loaded: {error}", "?")
