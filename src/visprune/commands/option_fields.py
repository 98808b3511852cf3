"""Command-line parameters made from the fields of an options dataclass (see `visprune.options`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from visprune.errors import UsageError
from visprune.options import OptionField, options_of

__all__ = ["typer_option", "with_options"]

Command = Callable[..., None]


def with_options(
    cls: type[Any], *, before: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Command], Command]:
    """Decorate a command that takes a dataclass of options as its keyword `options`.

    In the place of `options`, the decorated command has a parameter for each field. It makes the dataclass
    from their values and calls the command with it.

    Args:
        cls: The dataclass, whose fields are annotated with `visprune.options.Option`.
        before: Other parameters of the command that `--help` shows before a field, by the field's name.
    """
    options, before = options_of(cls), before or {}
    moved = {name for group in before.values() for name in group}

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        parameters: list[inspect.Parameter] = []
        for parameter in own.values():
            if parameter.name == "options":
                for field in options:
                    parameters += [own[name] for name in before.get(field.name, ())]
                    parameters += _parameters(field)
            elif parameter.name not in moved:
                parameters.append(parameter)

        @functools.wraps(command)
        def call(**given: Any) -> None:
            made = cls(**{field.name: _take(field, given) for field in options})
            command(options=made, **given)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def typer_option(cls: type[Any], name: str) -> Any:
    """Return typer's description of one field, for another command that has the same option."""
    return _typer_option(next(field for field in options_of(cls) if field.name == name))


def _typer_option(field: OptionField) -> Any:
    texts = field.texts
    flags = texts.flags
    if not flags and field.default is False:
        flags = (_flag(field.name),)  # typer would add --no-NAME
    shows = True if texts.shows is None else texts.shows
    return typer.Option(*flags, metavar=texts.metavar, help=texts.help, show_default=shows)


def _parameters(field: OptionField) -> list[inspect.Parameter]:
    """Return the parameter of a field, and that of its `--no-NAME` if it has one."""
    name, kind, default = _name(field), _value_type(field), field.default
    if default is MISSING:
        default = inspect.Parameter.empty
    if field.texts.off is None:
        return [_keyword(name, kind, _typer_option(field), default)]
    no_flag = typer.Option(_flag(f"no-{name}"), help=field.texts.off)
    return [
        _keyword(name, kind | None, _typer_option(field), None),
        _keyword(f"no_{name}", bool, no_flag, default=False),
    ]


def _keyword(name: str, kind: Any, option: Any, default: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _take(field: OptionField, given: dict[str, Any]) -> Any:
    """Remove the parameters of a field from those that were given, and return the field's value."""
    name = _name(field)
    value = given.pop(name)
    if field.texts.off is None:
        return value
    off = given.pop(f"no_{name}")
    if off and value is not None:
        raise UsageError(f"Both {_flag(name)} and {_flag(f'no-{name}')} were given.", "Give one of them.")
    return not off if value is None else value


def _name(field: OptionField) -> str:
    """Return the name of a field's parameter: that of its first flag.

    The field's own name may be that of another parameter: `--data` is the field `calibration` of an export,
    and `--calibration` belongs to the quantization that may follow.
    """
    return field.texts.flags[0].lstrip("-").replace("-", "_") if field.texts.flags else field.name


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value_type(field: OptionField) -> Any:
    """Return the type that a command line reads for a field: a path, number, switch, list, or else text."""
    members = [one for one in get_args(field.type) or (field.type,) if one is not NoneType]
    if Path in members:
        kind: Any = Path
    elif len(members) == 1 and get_origin(members[0]) is list:
        kind = members[0]
    else:
        kind = members[0] if len(members) == 1 and members[0] in (bool, int, float) else str
    return kind | None if NoneType in get_args(field.type) else kind
