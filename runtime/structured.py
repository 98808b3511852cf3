"""Answers in JSON: a schema becomes a grammar, and the grammar says which tokens may come next.

The grammar is llguidance's, which is imported when the first schema is compiled. This module knows the
tokenizer, and nothing of models or sampling.

A grammar allows one space wherever JSON allows white space, and no more: some models would otherwise write
white space until they run out of tokens. An answer that runs out of tokens is the beginning of such a JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visprune.errors import UnsupportedError, UsageError
from visprune.optional import require
from visprune.runtime.schema_bounds import check_cost, check_size, too_deep
from visprune.runtime.text import Tokenizer

__all__ = ["ANY_OBJECT", "Constraint", "Grammar", "JsonSchema", "check_schema", "compile_schema"]

JsonSchema: TypeAlias = Mapping[str, Any] | bool
"""A JSON Schema (draft 2020-12): an object, or True for any JSON value."""

ANY_OBJECT: JsonSchema = {"type": "object"}
"""The schema of any JSON object."""

_MAX_SYMBOLS = 10_000  # of the grammar; an object of 1,000 optional properties has as many
_MAX_LEXER_STATES = 25_000  # 1 to 2 kB each, for one answer; an ordinary schema takes some hundreds
_NO_JSON = "Unsatisfiable schema: "  # begins llguidance's message if nothing fits a schema
_MAX_SHOWN = 300  # characters of a message of llguidance

_vocabulary_lock = Lock()


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled schema for one tokenizer. Any number of answers may use it, in any thread."""

    _matcher: Any
    _tokenizer: Tokenizer

    def constraint(self) -> Constraint:
        """Return the constraint of a new answer."""
        return Constraint(self._matcher.deep_copy(), self._tokenizer)


class Constraint:
    """The place of one answer in its grammar. Make it with `Grammar.constraint`.

    Args:
        matcher: State of llguidance; the constraint changes it.
        tokenizer: Tokenizer of the answer.
    """

    def __init__(self, matcher: Any, tokenizer: Tokenizer) -> None:
        self._matcher = matcher
        self._eos = np.array(tokenizer.eos_token_ids, dtype=np.int64)
        self._never = np.array(sorted({*tokenizer.hidden_ids, tokenizer.image_token_id}), dtype=np.int64)
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, because it was ended or because nothing can follow."""
        return self._finished

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """Return which tokens may come next.

        A token that ends the answer is allowed where the JSON is complete. The image placeholder, other
        special tokens and ids that the tokenizer lacks are not allowed.

        Args:
            size: Number V of logits. It may differ from the size of the tokenizer.

        Returns:
            [V], True where a token is allowed.

        Raises:
            UnsupportedError: No token of this tokenizer can follow, or the grammar became too large.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        result = np.zeros(size, dtype=np.bool_)
        known = np.unpackbits(bits, bitorder="little")[:size]
        result[: known.size] = known
        result[self._never[self._never < size]] = False
        result[self._eos[self._eos < size]] = self._matcher.is_accepting()
        if self._matcher.is_error() or not result.any():
            raise _no_continuation(self._matcher)
        return result

    def mask(self, logits: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return logits [V] of which those of forbidden tokens are -inf; errors are those of `allowed`."""
        return np.where(self.allowed(logits.size), logits, logits.dtype.type(-np.inf))

    def accept(self, token: int) -> None:
        """Continue the answer with a token that `allowed` allows.

        Raises:
            UnsupportedError: The token is not allowed.
        """
        if token in self._eos:
            self._finished = True
            return
        if not self._matcher.consume_token(token):
            raise _no_continuation(self._matcher)
        self._finished = self._matcher.is_stopped()


def check_schema(schema: JsonSchema) -> None:
    """Refuse a schema that cannot be followed, without a tokenizer.

    Args:
        schema: The schema. Its semantics are those of JSON Schema: a key that `properties` does not name may
            be added unless `additionalProperties` is false.

    Raises:
        UsageError: It is no JSON object and no bool, or it is too large.
        UnsupportedError: It has a keyword, a format, a reference or a pattern that cannot be followed, or no
            JSON can satisfy it.
        MissingExtraError: llguidance is not installed.
    """
    library = require("llguidance", extra="structured")
    failed, messages = library.LLMatcher.validate_grammar_with_warnings(_grammar(schema), limits=_limits())
    if failed:
        raise _unsupported(messages[0])


def compile_schema(schema: JsonSchema, tokenizer: Tokenizer) -> Grammar:
    """Compile a schema for the answers of a tokenizer.

    The first call for a tokenizer reads its vocabulary, which takes about a second for 150,000 tokens. The
    vocabularies of the last four tokenizers are kept. This function may be called in any thread.

    Args:
        schema: The schema; see `check_schema`. `ANY_OBJECT` is the one of any JSON object.
        tokenizer: Tokenizer of the model. The grammar begins with the first new token of the answer, so an
            answer begun by the caller is not part of the JSON.

    Raises:
        UsageError: `check_schema` refuses it.
        UnsupportedError: `check_schema` refuses it, no JSON can satisfy it, or llguidance cannot read the
            tokenizer.
        MissingExtraError: llguidance is not installed.
    """
    library = require("llguidance", extra="structured")
    grammar = _grammar(schema)
    with _vocabulary_lock:
        vocabulary = _vocabulary(tokenizer)
    matcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=_limits())
    if matcher.is_error():
        raise _unsupported(matcher.get_error())
    compiled = Grammar(matcher, tokenizer)
    compiled.constraint().allowed(vocabulary.vocab_size)  # some schemas turn out to be empty only here
    return compiled


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """Return the vocabulary of a tokenizer in llguidance's form."""
    library = require("llguidance", extra="structured")
    try:
        return library.LLTokenizer(tokenizer.backend.to_str(), eos_token=tokenizer.eos_token_ids[0])
    except Exception as error:
        raise UnsupportedError(
            f"llguidance cannot read the tokenizer of this model: {_short(str(error))}.",
            "Ask without a JSON schema, and check the answer yourself.",
        ) from None


def _limits() -> Any:
    library = require("llguidance", extra="structured")
    return library.LLParserLimits(
        max_grammar_size=_MAX_SYMBOLS,
        max_items_in_row=_MAX_SYMBOLS,  # so that no allowed schema ends an answer in the middle
        max_lexer_states=_MAX_LEXER_STATES,
        verbose_errors=False,
    )


def _grammar(schema: JsonSchema) -> str:
    """Return the grammar of a schema in llguidance's form."""
    if isinstance(schema, bool):
        if not schema:
            raise _unsupported(f"{_NO_JSON} it is false")
        schema = {}  # llguidance takes options for objects only
    if not isinstance(schema, Mapping):
        raise UsageError(f"The JSON schema is a {type(schema).__name__}.", "Give a JSON object.")
    if "x-guidance" in schema:
        raise _unsupported('the keyword "x-guidance", which would turn checks off, is not supported')
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except RecursionError:
        raise too_deep() from None
    except (TypeError, ValueError) as error:  # UnicodeEncodeError, of half a character, is a ValueError
        raise UsageError(f"The JSON schema is not JSON: {error}.", "Correct it.") from None
    check_size(schema, size)
    library = require("llguidance", extra="structured")
    try:
        compiled: str = library.LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": " "}
        )
    except ValueError as error:
        raise _unsupported(str(error)) from None
    check_cost(compiled)
    return compiled


def _unsupported(message: str) -> UnsupportedError:
    if message.startswith(_NO_JSON):
        reason = _short(message.removeprefix(_NO_JSON))
        return UnsupportedError(f"No JSON fits the JSON schema: {reason}.", "Correct the schema.")
    message = message.replace("Unimplemented keys:", "it has keywords that are not supported,")
    return UnsupportedError(
        f"The JSON schema cannot be followed: {_short(message)}.",
        "Leave this out of the schema, and check the answer for it yourself.",
    )


def _no_continuation(matcher: Any) -> UnsupportedError:
    reason = _short(matcher.get_error())
    if reason and not reason.startswith("NoExtension"):
        return UnsupportedError(f"The JSON schema is too complex: {reason}.", "Give a simpler one.")
    return UnsupportedError(
        "No answer in the tokens of this model fits the JSON schema.", "Correct the schema."
    )


def _short(message: str) -> str:
    """Return a message of llguidance in one line, without a full stop."""
    line = " ".join(message.removesuffix("<non-verbose/>").split()).rstrip(".")
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."
