"""Options whose texts stand in the types of a dataclass's fields."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Annotated, TypeAlias

from visprune.options import Option, documented, options_of

Shared: TypeAlias = Annotated[str | None, Option("Shared by two.", shows="none")]


@documented
@dataclass(frozen=True, slots=True)
class Some:
    """Some options."""

    count: Annotated[int, Option("How many.", metavar="N")]
    shared: Shared = None
    internal: int = 3


def test_fields_have_their_type_default_and_texts():
    count, shared = options_of(Some)
    assert (count.name, count.type, count.default, count.texts.metavar) == ("count", int, MISSING, "N")
    assert (shared.name, shared.type, shared.default) == ("shared", str | None, None)
    assert shared.texts == Option("Shared by two.", shows="none")


def test_the_docstring_lists_them():
    assert Some.__doc__ == "Some options.\n\nAttributes:\n    count: How many.\n    shared: Shared by two."
