"""`visprune methods`: the pruning methods by place, or FitPrune's published recipes."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from visprune.terminal import print_json

__all__ = ["methods"]

_PLACES = ("before the encoder", "before the LLM", "inside the LLM")
_UNKNOWN = "?"  # the place of a method that cannot be loaded
_BASELINE = "baseline"
_WIDTH = 100  # columns, where the output is no terminal
_SOURCE = 24  # the most columns of a source


@dataclass(frozen=True, slots=True)
class _Method:
    """One method of the list."""

    name: str
    place: str
    about: str
    source: str

    @property
    def is_baseline(self) -> bool:
        return self.source.startswith(_BASELINE)

    @property
    def short_source(self) -> str:
        """The source as a column shows it: the number at arXiv if it has one."""
        if self.is_baseline:
            return _BASELINE
        number = re.search(r"arXiv [\w./]+", self.source)
        return number[0] if number else textwrap.shorten(self.source, _SOURCE, placeholder="…")


def methods(
    recipes: Annotated[
        bool, typer.Option("--recipes", help="List FitPrune's published recipes instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead.")] = False,
) -> None:
    """List the pruning methods, by the place where they prune; baselines stand last.

    Example: visprune-methods
    """
    if recipes:
        _list_recipes(as_json=as_json)
        return
    from visprune.pruning.registry import method_names

    rows = [_row(name) for name in method_names()]
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        _print(rows)


def _row(name: str) -> _Method:
    from visprune.pruning.registry import load_method

    try:
        method = load_method(name)
        about = (method.__doc__ or "").strip().splitlines()
        return _Method(name, str(method.place), about[0] if about else "", str(method.paper))
    except Exception as error:  # a broken method of another package must not hide the rest
        return _Method(name, _UNKNOWN, f"cannot be loaded: {error}", _UNKNOWN)


def _print(rows: Sequence[_Method]) -> None:
    """Print one line for each method that can be loaded; what does not fit into it ends with an ellipsis."""
    columns = shutil.get_terminal_size((_WIDTH, 24)).columns
    name_width = max(len(row.name) for row in rows)
    source_width = max(len(row.short_source) for row in rows)
    room = max(_SOURCE, columns - name_width - source_width - 6)
    about_width = min(room, max(len(row.about) for row in rows))
    places = [*_PLACES, *(row.place for row in rows if row.place != _UNKNOWN), _UNKNOWN]
    blocks = []
    for place in dict.fromkeys(places):
        here = [row for row in rows if row.place == place]
        lines = ["not usable" if place == _UNKNOWN else place] if here else []
        for row in sorted(here, key=lambda row: (row.is_baseline, row.name)):
            about = " ".join(row.about.split())
            if place != _UNKNOWN:
                about = textwrap.shorten(about, about_width, placeholder="…")
                about = f"{about:<{about_width}}  {row.short_source}"
            lines.append(f"  {row.name:<{name_width}}  {about}")
        blocks += ["\n".join(lines)] if lines else []
    print("\n\n".join(blocks))


def _list_recipes(*, as_json: bool) -> None:
    """Print FitPrune's published recipes, with what each is said to remove and what it removes."""
    from visprune.pruning.published import published_recipes

    found = tuple(published_recipes().values())
    if as_json:
        print_json(
            [
                {
                    "name": one.published,
                    "model": one.model,
                    "source": one.source,
                    "visual_tokens": one.visual_tokens,
                    "num_layers": one.num_layers,
                    "prune_points": one.prune_points,
                    "scheme": one.scheme,
                    "nominal_reduction": one.nominal_reduction,
                    "true_reduction": one.true_reduction,
                    "shortfall": one.shortfall,
                }
                for one in found
            ]
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "name", "model", "visual tokens", "prune points", "nominal", "true", box=None, pad_edge=False
    )
    for one in found:
        table.add_row(
            one.published,
            one.model,
            str(one.visual_tokens),
            str(len(one.prune_points)),
            f"{one.nominal_reduction:.0%}",
            f"{one.true_reduction:.1%}{' *' if one.shortfall else ''}",
        )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table, soft_wrap=False)
    console.print(
        f"\nprune points: layers that delete tokens, of {found[0].num_layers}\n"
        f"nominal and true: reduction of the visual work ({found[0].convention})\n"
        "* removes less than its name says, by more than 2 percentage points\n"
        f"source: {found[0].source}\n"
        "use: visprune-export MODEL --method fitprune --recipe published:NAME"
    )
