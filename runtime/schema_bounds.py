"""Bounds of JSON schemas that strangers send: on their size, and on what it costs to compile them.

Patterns that are combined, as by `allOf`, can cost time and memory that grow exponentially with their number,
and no look at a schema tells which do. So each schema is compiled once in a process of its own, which ends
when it has used too much.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Collection, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from visprune.errors import UsageError

__all__ = ["check_cost", "check_size", "too_deep"]

_MAX_BYTES = 64 * 1024
_MAX_NESTING = 64  # objects and lists inside each other; llguidance's parser ends at 128
_MAX_PATTERNS = 64  # of patternProperties; each is compared with all others
_MAX_MULTIPLE = 10_000  # of multipleOf, without its decimal point; there are as many states of a lexer
_MAX_SECONDS = 2  # of processor time to compile a schema; an ordinary one takes some milliseconds
_MAX_MEMORY = 2_000_000_000  # bytes of addresses, of which Python and llguidance take a quarter
_WAIT = 60  # seconds in which those of the processor are over, on a machine that does much else

_COMPILE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from llguidance import LLMatcher
LLMatcher.validate_grammar_with_warnings(sys.stdin.read())
""".replace("SECONDS", str(_MAX_SECONDS)).replace("MEMORY", str(_MAX_MEMORY))


def check_size(schema: Mapping[str, Any], size: int) -> None:
    """Refuse a schema that is too large, nests too deep, or would be compiled to too many states.

    Args:
        schema: The schema.
        size: Its bytes as JSON.

    Raises:
        UsageError: It is beyond a bound.
    """
    if size > _MAX_BYTES:
        raise _too_large(f"has {size} bytes; at most {_MAX_BYTES} are allowed")
    patterns, factors = 0, set()
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Mapping):
            named, factor = value.get("patternProperties"), value.get("multipleOf")
            patterns += len(named) if isinstance(named, Mapping) else 0
            if isinstance(factor, int | float) and not isinstance(factor, bool):
                factors.add(repr(factor))
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        if inner and depth > _MAX_NESTING:
            raise too_deep()
        waiting.extend((each, depth + 1) for each in inner)
    if patterns > _MAX_PATTERNS:
        raise _too_large(f"has {patterns} patternProperties; at most {_MAX_PATTERNS} are allowed")
    if _common_multiple(factors) > _MAX_MULTIPLE:
        raise _too_large(f"has values of multipleOf with a common multiple above {_MAX_MULTIPLE}")


def _common_multiple(numbers: Collection[str]) -> int:
    """Return the least common multiple of numbers, all of them without their decimal point."""
    places = [-int(Decimal(number).as_tuple().exponent) for number in numbers]
    shift = 10 ** max(0, *places, 0)
    return math.lcm(*(int(Fraction(number) * shift) for number in numbers))


def _too_large(found: str) -> UsageError:
    return UsageError(f"The JSON schema {found}.", "Give a smaller one, and check the answer for the rest.")


@lru_cache(maxsize=64)
def check_cost(grammar: str) -> None:
    """Refuse a schema that takes too long to compile.

    Args:
        grammar: The schema in llguidance's form. Faults of another kind are left to whoever compiles it.

    Raises:
        UsageError: It takes more than two seconds or too much memory.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE],
            input=grammar.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_WAIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _too_costly() from None
    if done.returncode:
        raise _too_costly()


def too_deep() -> UsageError:
    """Return the error of a schema that nests too deep."""
    return _too_large(f"is nested more than {_MAX_NESTING} deep")


def _too_costly() -> UsageError:
    found = f"takes more than {_MAX_SECONDS} seconds to compile, which patterns do that are combined (allOf)"
    return _too_large(found)
