"""Commands whose parameters are made from a dataclass of options."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer

from visprune.commands.option_fields import typer_option, with_options
from visprune.errors import UsageError
from visprune.export.export_options import ExportOptions
from visprune.options import Option, options_of

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True, slots=True)
class Some:
    name: Annotated[str, Option("A name.", flags=("--name", "-n"))]
    ratio: Annotated[float | None, Option("A ratio.", shows="all")] = None
    file: Annotated[str | Path | None, Option("A file.", flags=("--data",), metavar="FILE")] = None
    check: Annotated[bool | Literal["all", "some"], Option("How far.", off="Not at all.")] = True
    smooth: Annotated[bool, Option("Smooth it.")] = True
    trust_it: Annotated[bool, Option("Trust it.")] = False


@pytest.fixture
def call():
    """Parse a command line as the program does, and return what the command was called with."""
    given = []

    @with_options(Some, before={"check": ("extra",)})
    def command(
        model: Annotated[str | None, typer.Argument()] = None,
        *,
        options: Some,
        extra: int = 1,
        last: bool = False,
    ) -> None:
        """Do something."""
        given.append((model, options, extra, last))

    app = typer.Typer(add_completion=False)
    app.command()(command)

    def run(*arguments):
        typer.main.get_command(app).main(list(arguments), standalone_mode=False)
        return given.pop() if given else None

    return run


def test_defaults_are_those_of_the_dataclass(call):
    assert call("-n", "a") == (None, Some("a"), 1, False)


def test_every_kind_of_value(call):
    line = [
        "m",
        "--name",
        "a",
        "--ratio",
        "0.5",
        "--data",
        "x/y",
        "--check",
        "some",
        "--no-smooth",
        "--trust-it",
    ]
    wanted = Some("a", 0.5, Path("x/y"), "some", smooth=False, trust_it=True)
    assert call(*line, "--extra", "2", "--last") == ("m", wanted, 2, True)


def test_a_value_that_can_be_switched_off(call):
    assert call("-n", "a", "--no-check")[1] == replace(Some("a"), check=False)
    with pytest.raises(UsageError, match="Both --check and --no-check were given"):
        call("-n", "a", "--check", "all", "--no-check")


def test_help_has_the_order_of_the_fields(call, capsys):
    call("--help")
    shown = re.findall(r"^│ [* ]  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    wanted = ["--name", "--ratio", "--data", "--extra", "--check", "--no-check", "--smooth", "--trust-it"]
    assert shown == [*wanted, "--last", "--help"]


def test_another_command_may_share_one_option():
    shared = typer_option(Some, "file")
    assert (shared.metavar, shared.help) == ("FILE", "A file.")


def test_the_documentation_names_every_option():
    text = (DOCS / "export.md").read_text(encoding="utf-8")
    for field in options_of(ExportOptions):
        flags = field.texts.flags or (f"--{field.name.replace('_', '-')}",)
        assert f"`{flags[0]}" in text
