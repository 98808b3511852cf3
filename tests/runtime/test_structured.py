"""Grammars of JSON schemas against the texts that they stand for, spelled out by hand."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from visprune.errors import MissingExtraError, UnsupportedError, UsageError
from visprune.runtime import structured
from visprune.runtime.sampling import Sampler, Sampling
from visprune.runtime.structured import ANY_OBJECT, check_schema, compile_schema
from visprune.runtime.text import Tokenizer

pytest.importorskip("llguidance")

EOS, IMAGE, END_OF_TURN = 1, 2, 3
SPECIAL = ["<bos>", "<eos>", "<image>", "<end_of_turn>"]
LONGER = ['{"', '":', '"a"', "12", "true", "]}", '", "', "ü", "日", '{"a": 1}', " 1", "  ", "null"]


def gpt2_character(value):
    """GPT-2's rule: printable bytes stand for themselves, the others follow from 256 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [v for v in range(256) if v not in kept]
    return chr(value) if value in kept else chr(256 + others.index(value))


def byte_level():
    """A tokenizer as GPT-2's and Qwen's, and the bytes of its tokens in order."""
    words = [*(bytes([value]) for value in range(256)), *(text.encode() for text in LONGER)]
    names = ["".join(map(gpt2_character, word)) for word in words]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *names])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend, words


def byte_fallback():
    """A tokenizer as Llama's: a space is written as a bar, and other characters as tokens of single bytes."""
    letters = [chr(value) for value in range(33, 127)]
    words = [bytes([value]) for value in range(256)]
    words += [text.encode() for text in (*letters, " ", *LONGER) if text != "日"]
    names = [f"<0x{value:02X}>" for value in range(256)]
    names += [text.replace(" ", "▁") for text in (*letters, " ", *LONGER) if text != "日"]
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *names])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<bos>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend, words


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda make: make.__name__)
def both(request):
    """A tokenizer of each kind, and the bytes of each of its tokens that is no special one."""
    backend, words = request.param()
    backend.add_special_tokens(SPECIAL)
    tokenizer = Tokenizer.from_backend(backend, "<image>", IMAGE, "<bos>", (EOS, END_OF_TURN))
    return tokenizer, dict(enumerate(words, len(SPECIAL)))


@pytest.fixture(scope="module")
def tokenizer():
    backend, _ = byte_level()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer.from_backend(backend, "<image>", IMAGE, "<bos>", (EOS, END_OF_TURN))


def spaced(*parts):
    """All texts of JSON's tokens, with or without a space between each two."""
    gaps = itertools.product(["", " "], repeat=len(parts) - 1)
    return ["".join(map("".join, zip(parts, [*gap, ""], strict=True))) for gap in gaps]


LANGUAGES = [
    ({"enum": ["a", "ab", 12, None, True]}, ['"a"', '"ab"', "12", "null", "true"]),
    ({"const": "日ü"}, ['"日ü"']),
    ({"type": "integer", "minimum": 8, "maximum": 12}, ["8", "9", "10", "11", "12"]),
    ({"type": "string", "pattern": "^a{1,3}$"}, ['"a"', '"aa"', '"aaa"']),
    ({"type": "boolean"}, ["true", "false"]),
    (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        [
            text
            for values in (("true",), ("false",), *itertools.product(("true", "false"), repeat=2))
            for text in spaced("[", *",".join(values).replace(",", " , ").split(), "]")
        ],
    ),
    (
        {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}, "größe": {"type": "null"}},
            "required": ["a"],
            "additionalProperties": False,
        },
        [
            text
            for one in ("1", "2")
            for rest in ((), (",", '"größe"', ":", "null"))
            for text in spaced("{", '"a"', ":", one, *rest, "}")
        ],
    ),
    (
        {"$ref": "#/$defs/pair", "$defs": {"pair": {"prefixItems": [{"const": 1}, {"const": 2}],
         "type": "array", "items": False, "minItems": 2}}},
        spaced("[", "1", ",", "2", "]"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "texts"), LANGUAGES, ids=lambda value: json.dumps(value)[:40])
def test_the_mask_equals_trying_each_token(both, schema, texts):
    tokenizer, words = both
    size = tokenizer.backend.get_vocab_size() + 37  # a padded head
    whole = {text.encode() for text in texts}
    prefixes = {text[:end] for text in whole for end in range(len(text) + 1)}
    grammar = compile_schema(schema, tokenizer)
    waiting, seen = [()], set()
    while waiting:
        path = waiting.pop()
        begun = b"".join(words[i] for i in path)
        if begun in seen:
            continue
        seen.add(begun)
        constraint = grammar.constraint()
        for token in path:
            constraint.accept(token)
        expected = {i for i, word in words.items() if begun + word in prefixes}
        follow = sorted(expected)
        assert constraint.finished == (not follow)
        if begun in whole:
            expected |= {EOS, END_OF_TURN}
        allowed = set(np.flatnonzero(constraint.allowed(size)).tolist())
        if len({words[token][0] for token in follow}) == 1 and begun not in whole:
            # What can be written in one way only is written in the tokens that the tokenizer would take.
            assert allowed
            assert allowed <= expected, begun
        else:
            assert allowed == expected, begun
        waiting += [(*path, token) for token in follow]
    assert whole <= seen


def test_a_head_may_be_smaller_than_the_tokenizer(tokenizer):
    constraint = compile_schema({"enum": [1, 2]}, tokenizer).constraint()
    everything = constraint.allowed(400)
    assert (constraint.allowed(60) == everything[:60]).all()


SETTINGS = [
    Sampling(),
    Sampling(repetition_penalty=0.5),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=3.0, top_k=1000, seed=2),
    Sampling(temperature=0.5, top_p=0.4, repetition_penalty=2.0, seed=3),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_only_allowed_tokens_are_drawn(tokenizer, sampling, on_device):
    class OnDevice:
        """Logits of which the largest is known; it is a forbidden token."""

        def __init__(self, logits):
            self._logits = logits

        def argmax(self):
            raise AssertionError("the largest of all logits is not the largest that is allowed")

        def numpy(self):
            return self._logits[None, None]

    random = np.random.default_rng(0)
    schema, texts = LANGUAGES[6]
    grammar = compile_schema(schema, tokenizer)
    for _ in range(10):
        constraint, answer = grammar.constraint(), []
        sampler = Sampler(sampling, constraint)
        while not constraint.finished:
            logits = (random.standard_normal(400) * 5).astype(np.float32)
            answer.append(sampler(OnDevice(logits) if on_device else logits, answer))
        assert tokenizer.decode(answer) in texts
        assert answer[-1] not in tokenizer.eos_token_ids  # nothing can follow the last brace


def test_a_token_that_ends_the_answer_is_chosen_like_any_other(tokenizer):
    logits = np.zeros(300, np.float32)
    logits[[tokenizer.backend.token_to_id("1"), END_OF_TURN]] = 5.0, 9.0
    constraint = compile_schema({"type": "integer"}, tokenizer).constraint()
    sampler = Sampler(Sampling(), constraint)
    first, second = sampler(logits, []), sampler(logits, [])
    assert (tokenizer.decode([first]), second) == ("1", END_OF_TURN)
    assert constraint.finished


def test_a_forbidden_token_is_refused(tokenizer):
    constraint = compile_schema({"enum": [1]}, tokenizer).constraint()
    with pytest.raises(UnsupportedError):
        constraint.accept(tokenizer.backend.token_to_id("2"))


NESTED = json.loads('{"items":' * 100 + "{}" + "}" * 100)
ENDLESS = json.loads('{"items":' * 900 + "{}" + "}" * 900)
REFUSED = [
    (3, UsageError, "is a int"),
    ([], UsageError, "is a list"),
    ({"a": {1}}, UsageError, "is not JSON: .*set"),
    ({"minimum": float("nan")}, UsageError, "is not JSON"),
    ({"const": "\ud800"}, UsageError, "is not JSON"),
    (NESTED, UsageError, "more than 64 deep"),
    (ENDLESS, UsageError, "more than 64 deep"),
    ({"description": "x" * 70_000}, UsageError, "has 70019 bytes"),
    ({"patternProperties": {f"^{i}$": {} for i in range(65)}}, UsageError, "65 patternProperties"),
    ({"multipleOf": 1_000_003}, UsageError, "multipleOf"),
    ({"allOf": [{"multipleOf": 997}, {"multipleOf": 99.1}]}, UsageError, "multipleOf"),
    ({"properties": {f"k{i}": {} for i in range(3000)}}, UnsupportedError, "too big"),
    ({"x-guidance": {"lenient": True}}, UnsupportedError, '"x-guidance"'),
    ({"not": {}}, UnsupportedError, r'not supported, \["not"\]'),
    ({"if": {}, "then": {}}, UnsupportedError, '"if", "then"'),
    ({"properties": {"a": {"uniqueItems": True}}}, UnsupportedError, '"uniqueItems"'),
    ({"type": "strin"}, UnsupportedError, "Invalid type: strin"),
    ({"type": "string", "format": "colour"}, UnsupportedError, "Unknown format: colour"),
    ({"type": "string", "pattern": "(?=a)b"}, UnsupportedError, "look-ahead"),
    ({"type": "string", "pattern": "(a"}, UnsupportedError, "unclosed group"),
    ({"$ref": "http://127.0.0.1/schema.json"}, UnsupportedError, "does not fetch"),
    ({"$ref": "file:///etc/passwd"}, UnsupportedError, "does not fetch"),
    ({"$ref": "#/$defs/none"}, UnsupportedError, "does not exist"),
    (False, UnsupportedError, "No JSON fits the JSON schema: it is false"),
    ({"enum": []}, UnsupportedError, "No JSON fits"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, UnsupportedError, "No JSON fits"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, UnsupportedError, "No JSON fits"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, UnsupportedError, "No JSON fits"),
    ({"type": "string", "pattern": "^a$", "minLength": 2}, UnsupportedError, "No JSON fits"),
]


@pytest.mark.parametrize(("schema", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_cannot_be_followed_is_refused(tokenizer, schema, error, message):
    with pytest.raises(error, match=message):
        check_schema(schema)
    with pytest.raises(error, match=message):
        compile_schema(schema, tokenizer)


def test_a_schema_that_only_refers_to_itself_is_refused(tokenizer):
    with pytest.raises(UnsupportedError, match="No answer"):
        compile_schema({"$ref": "#"}, tokenizer)


ACCEPTED = [
    True,
    {},
    ANY_OBJECT,
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
    {"properties": {"multipleOf": {"multipleOf": 0.01}, "patternProperties": {"multipleOf": 5}}},
    {"properties": {f"k{i}": {} for i in range(500)}},
    {"type": "string", "pattern": "(a|b)*a(a|b){14}c"},
]


@pytest.mark.parametrize("schema", ACCEPTED, ids=lambda schema: str(schema)[:40])
def test_what_can_be_followed_is_accepted(tokenizer, schema):
    check_schema(schema)
    assert compile_schema(schema, tokenizer).constraint().allowed(400).any()


def test_a_tokenizer_that_llguidance_cannot_read():
    words = {text: i for i, text in enumerate([*SPECIAL, "a"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    odd = Tokenizer.from_backend(backend, "<image>", IMAGE, None, (EOS,))
    with pytest.raises(UnsupportedError, match="cannot read the tokenizer"):
        compile_schema(ANY_OBJECT, odd)


def test_threads_share_one_vocabulary(tokenizer):
    own = replace(tokenizer, bos_token=None)  # equal to no tokenizer of another test
    before = structured._vocabulary.cache_info().misses
    found = []

    def work(number):
        constraint = compile_schema({"const": number}, own).constraint()
        found.append([int(np.flatnonzero(constraint.allowed(400))[0]), number])

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [[tokenizer.backend.token_to_id(str(n)), n] for n in range(8)]
    assert structured._vocabulary.cache_info().misses == before + 1


def test_without_llguidance(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for call in (check_schema, lambda schema: compile_schema(schema, tokenizer)):
        with pytest.raises(MissingExtraError, match="structured"):
            call(ANY_OBJECT)


def test_patterns_whose_combination_grows_without_bound_are_refused():
    patterns = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(5, 25)]
    with pytest.raises(UsageError, match="takes more than 2 seconds to compile"):
        check_schema({"allOf": patterns})
    assert check_schema({"allOf": patterns[:2]}) is None
