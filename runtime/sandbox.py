"""Where chat templates run: the sandbox and the helpers that transformers gives them, with bounds.

Knows Jinja2 and nothing of conversations.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from math import inf
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MAX_RENDERED", "RefusedError", "template_environment"]

MAX_RENDERED = 4_000_000
"""Longest rendered conversation, in characters: far past any context, well within a small memory."""

_STAR = re.compile(r"%[#0\- +]*(\d*\.)?\*")  # a format's width or precision from its arguments


class RefusedError(TemplateError):
    """The template called `raise_exception`: the conversation is at fault, not the template."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a bound on what one operator can allocate.

    The sandbox bounds `range` and `render` bounds the output, but a single `"a" * 10**12` or
    `"%0300000000d" % 1` is neither. Of a `%` with a text on its left, all numbers in that text may come to
    `MAX_RENDERED` together, and `*`, a width from elsewhere, is refused.

    Not bounded: what methods and filters allocate (`"a".ljust(10**9)`, `"{:0300000000d}".format(1)`,
    `|center`, `|format`, `|replace`), what grows step by step in a loop (`x ~ x`), and processor time.
    Nothing short of a process of its own stops those, so a template deserves as much trust as its weights.
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("it raises to a power")  # 9**9**9 never ends, and no prompt needs a power
        if operator == "%":
            if isinstance(left, str) and _widths(left) > MAX_RENDERED:
                raise SecurityError(f"it pads a text to more than {MAX_RENDERED:,} characters")
            return super().call_binop(context, operator, left, right)
        for sequence, count in ((left, right), (right, left)):
            repeats = isinstance(sequence, (str, list, tuple)) and isinstance(count, int)
            if repeats and len(sequence) * count > MAX_RENDERED:
                raise SecurityError(f"it repeats a text to more than {MAX_RENDERED:,} characters")
        return super().call_binop(context, operator, left, right)


def _widths(form: str) -> float:
    """No less than the widths and precisions of a format with `%`; its other numbers count as well."""
    numbers = re.findall(r"\d+", form)
    if _STAR.search(form) or any(len(number) > 12 for number in numbers):
        return inf
    return sum(map(int, numbers))


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the answers for training and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def template_environment() -> ImmutableSandboxedEnvironment:
    """A new one."""
    # As in transformers (utils/chat_template_utils.py), on which published templates rely.
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson  # jinja2's own escapes what HTML reserves
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _raise_exception(message: str) -> None:
    raise RefusedError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
