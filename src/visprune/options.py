"""Options written once: a dataclass field whose type carries its help text.

    @dataclass(frozen=True, slots=True)
    class FitOptions:
        seed: Annotated[int, Option("To draw them with.")] = 0

The dataclass has the default and, in `__post_init__`, the check. `visprune.commands.option_fields` makes the
parameters of a command from the fields, so a command needs no second list of them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

__all__ = ["Option", "OptionField", "documented", "options_of"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Option:
    """The texts of one option, as `--help` shows them.

    Attributes:
        help: A sentence, without the default.
        metavar: Placeholder of the value; None: the name of its type.
        flags: Names on the command line; empty: the field's name with dashes.
        shows: Text shown as the default of an option that is None by default.
        off: Help text of a second flag, `--no-NAME`, that sets the field to False. It is for a field that is
            True by default and may also be a text.
    """

    help: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    shows: str | None = None
    off: str | None = None


@dataclass(frozen=True, slots=True)
class OptionField:
    """A field of a dataclass that is an option.

    Attributes:
        name: Of the field.
        type: Its type, without `Annotated`.
        default: `dataclasses.MISSING` if the option is required.
        texts: As they stand in its annotation.
    """

    name: str
    type: Any
    default: Any
    texts: Option


def options_of(cls: type[Any]) -> tuple[OptionField, ...]:
    """Return the fields of a dataclass that are options: its own in order, and then those it inherits."""
    hints = get_type_hints(cls, include_extras=True)
    found = []
    for field in sorted(fields(cls), key=lambda field: field.name not in inspect.get_annotations(cls)):
        hint = hints[field.name]
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        found += [
            OptionField(field.name, kind, field.default, one) for one in extras if isinstance(one, Option)
        ]
    return tuple(found)


def documented(cls: type[T]) -> type[T]:
    """Append the help text of every option to the docstring of a dataclass."""
    lines = [f"    {field.name}: {field.texts.help}" for field in options_of(cls)]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls
