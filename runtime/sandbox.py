"""Jinja2 environment in which chat templates run: a sandbox, bounds, and the helpers that transformers adds.

This module knows Jinja2, and nothing of conversations.
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
"""Longest rendered conversation, in characters: far more than any context, and little memory."""

_STAR = re.compile(r"%[#0\- +]*(\d*\.)?\*")  # a width or precision that is taken from the arguments


class RefusedError(TemplateError):
    """The template called `raise_exception`: the conversation is at fault, not the template."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of Jinja2, with a bound on the memory that one operator can allocate.

    Jinja2's sandbox bounds `range`, and `ChatTemplate.render` bounds the output, but neither stops a single
    `"a" * 10**12` or `"%0300000000d" % 1`. If the left side of `%` is a text, the numbers in it may add up to
    at most `MAX_RENDERED`, and `*` (a width from the arguments) is refused.

    Not bounded are memory that methods and filters allocate (`"a".ljust(10**9)`,
    `"{:0300000000d}".format(1)`, `|center`, `|format`, `|replace`), values that grow step by step in a loop
    (`x ~ x`), and processor time. Only a separate process could stop those, so use templates only from
    sources whose weights you would trust.
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("it computes a power")  # 9**9**9 never ends, and no prompt needs a power
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
    """Return an upper bound of the widths and precisions in a `%` format: the sum of all numbers in it."""
    numbers = re.findall(r"\d+", form)
    if _STAR.search(form) or any(len(number) > 12 for number in numbers):
        return inf
    return sum(map(int, numbers))


class _Generation(Extension):
    """The tag `{% generation %}`, which marks answers for training and has no effect here."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def template_environment() -> ImmutableSandboxedEnvironment:
    """Return a new environment."""
    # The settings and helpers of transformers (utils/chat_template_utils.py), on which templates rely.
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson  # Jinja2's own filter escapes characters for HTML
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
