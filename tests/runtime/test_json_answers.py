"""Answers of the demo model under JSON schemas, judged by the package jsonschema."""

from __future__ import annotations

import json

import pytest

import visprune
from visprune import cli
from visprune.bundled import IMAGE
from visprune.errors import UnsupportedError
from visprune.runtime import Sampling
from visprune.runtime.structured import ANY_OBJECT

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

PROMPT = "What shape is blue?"
SHAPES = {"enum": ["circle", "diamond", "square", "heart", "star"]}
SCHEMAS = {
    "enum": SHAPES,
    "record": {
        "type": "object",
        "properties": {
            "shape": SHAPES,
            "count": {"type": "integer", "minimum": 0, "maximum": 12},
            "sure": {"type": "boolean"},
        },
        "required": ["shape", "count", "sure"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {"größe": {"type": "number", "multipleOf": 0.5, "maximum": 9}, "名": SHAPES},
        "minProperties": 1,
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"anyOf": [SHAPES, {"type": "null"}]}, "minItems": 2, "maxItems": 4},
    "text": {"type": "string", "minLength": 3, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,5}-[0-9]{2}$"},
    "date": {"type": "string", "format": "date"},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": SHAPES, "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            },
            "leaf": {"type": "array", "items": SHAPES, "maxItems": 2},
        },
    },
    "one": {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "boolean"}]},
}
DRAWN = [Sampling()] + [Sampling(temperature=1.5, top_k=200, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def pipeline(demo_bundle):
    with visprune.load(demo_bundle) as loaded:
        yield loaded


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_answer_fits_its_schema(pipeline, schema):
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for sampling in DRAWN:
        answer = pipeline.generate(IMAGE, PROMPT, schema=schema, sampling=sampling, max_new_tokens=200)
        validator.validate(json.loads(answer.text))
        assert answer.finish_reason == "eos"


def test_any_object(pipeline):
    for seed in range(4):
        sampling = Sampling(temperature=2.0, seed=seed)
        answer = pipeline.generate(IMAGE, PROMPT, schema=ANY_OBJECT, sampling=sampling, max_new_tokens=300)
        if answer.finish_reason == "eos":
            assert isinstance(json.loads(answer.text), dict)
        else:
            assert answer.text.startswith("{")


def test_an_answer_that_runs_out_of_tokens_is_the_beginning_of_one_that_does_not(pipeline):
    whole = pipeline.generate(IMAGE, PROMPT, schema=SCHEMAS["record"], max_new_tokens=100)
    cut = pipeline.generate(IMAGE, PROMPT, schema=SCHEMAS["record"], max_new_tokens=5)
    assert cut.finish_reason == "length"
    assert cut.token_ids == whole.token_ids[:5]
    assert whole.text.startswith(cut.text)
    # With exactly enough tokens, the answer is complete.
    enough = pipeline.generate(IMAGE, PROMPT, schema=SCHEMAS["record"], max_new_tokens=len(whole.token_ids))
    assert (enough.text, enough.finish_reason) == (whole.text, "eos")


def test_pieces_and_turns_of_a_chat(pipeline):
    chat = pipeline.chat()
    pieces = list(chat.stream(PROMPT, [IMAGE], schema=SCHEMAS["record"]))
    assert json.loads("".join(pieces)).keys() == {"shape", "count", "sure"}
    assert json.loads(chat.generate(PROMPT, schema=SHAPES).text) in SHAPES["enum"]
    with pytest.raises(UnsupportedError, match='"not"'):
        chat.stream(PROMPT, schema={"not": {}})


class TestCommand:
    @pytest.fixture
    def ask(self, demo_bundle, tmp_path, capfd):
        def run(content, *options):
            path = tmp_path / "schema.json"
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            arguments = [demo_bundle, "--image", IMAGE, "--prompt", PROMPT, "--json-schema", path, *options]
            code = cli.run_command("run", list(map(str, arguments)))
            return code, *capfd.readouterr()

        return run

    def test_the_answer_fits(self, ask):
        code, out, _ = ask(SCHEMAS["record"])
        assert code == 0
        jsonschema.validate(json.loads(out), SCHEMAS["record"])
        code, out, _ = ask(SHAPES, "--json", "--temperature", "1", "--seed", "3")
        assert json.loads(json.loads(out)["text"]) in SHAPES["enum"]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, ["No such file"]),
            (b"{", ["cannot be read"]),
            (b"\xff\xfe\x00", ["cannot be read"]),
            (b'{"items":' * 2000 + b"{}" + b"}" * 2000, ["recursion"]),
            (b" " * 1_000_001 + b"{}", ["cannot be read"]),
            ([], ["is a list"]),
            (False, ["it is false"]),
            ({"not": {"type": "string"}}, ["not supported", '"not"']),
            ({"$ref": "other.json"}, ["other.json"]),
        ],
    )
    def test_a_schema_that_cannot_be_used(self, ask, monkeypatch, content, words):
        monkeypatch.setattr("visprune.runtime.load", lambda *_, **__: pytest.fail("the model was loaded"))
        code, out, err = ask(content)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        for word in words:
            assert word in err
