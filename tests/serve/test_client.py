"""OpenAI's client library against the server: every form of question and answer.

The server has the demo model, which answers in a word, and a random one, whose answers are as long as they
may be. The oracle is the runtime without caches, and the command `visprune run`.
"""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import numpy as np
import openai
import pytest
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from serving import data_url, picture_part, serving, text_part

import visprune
from visprune import cli
from visprune.bundled import IMAGE
from visprune.runtime import Message, Sampling

jsonschema = pytest.importorskip("jsonschema")

QUESTION = "What is the letter?"
SHAPES = Literal["circle", "diamond", "square", "heart", "star"]


@pytest.fixture(scope="module")
def server(demo_bundle, tiny_bundle):
    with serving([demo_bundle, tiny_bundle]) as served:
        yield served
        assert "which is a bug" not in "\n".join(served.lines)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(demo_bundle, tiny_bundle):
    """Answers messages with a pipeline that keeps nothing from one request to the next."""
    with visprune.load(demo_bundle, threads=1) as demo, visprune.load(tiny_bundle, threads=1) as tiny:

        def answer(messages, model="tiny", **options):
            pipeline = {"uniform": demo, "tiny": tiny}[model]
            turn = pipeline.prepare([Message(*message) for message in messages], **options)
            return pipeline.answer(turn).result

        yield answer


@pytest.fixture(scope="module")
def image():
    with Image.open(IMAGE) as image:
        return image.convert("RGB")


def blocks(seed):
    """A picture of blocks, one for each patch of the random model."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(14, axis=0).repeat(14, axis=1))


def shown(image):
    return picture_part(data_url(image))


def user(*content):
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def ask(client, *messages, model="tiny", **fields):
    fields.setdefault("max_tokens", 24)
    return client.chat.completions.create(model=model, messages=messages, **fields)


def text_of(reply):
    return reply.choices[0].message.content


def joined(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["uniform", "tiny"]
    model = client.models.retrieve("tiny")
    assert (model.owned_by, model.visprune["visual_tokens"]) == ("visprune", 16)


class TestForms:
    @pytest.mark.parametrize("model", ["uniform", "tiny"])
    def test_whole_and_streamed(self, client, image, alone, model):
        message = user(shown(image), text_part("Where is the digit?"))
        wanted = alone([("user", [image, "Where is the digit?"])], model, max_new_tokens=24)
        whole = ask(client, message, model=model)
        assert text_of(whole) == wanted.text
        chunks = list(ask(client, message, model=model, stream=True))
        assert joined(chunks) == wanted.text
        finish = "length" if model == "tiny" else "stop"
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == finish
        assert chunks[-1].visprune["keep_indices"] == [list(kept) for kept in wanted.keep_indices]

    def test_usage_comes_if_it_is_asked_for(self, client):
        whole = ask(client, user("Tell me."))
        *chunks, last = ask(client, user("Tell me."), stream=True, stream_options={"include_usage": True})
        assert (last.choices, last.usage.completion_tokens) == ([], 24)
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
        assert all(chunk.usage is None for chunk in chunks)
        assert not any(chunk.usage for chunk in ask(client, user("Tell me."), stream=True))
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24

    def test_several_pictures_with_text_between(self, client, alone):
        content = [text_part("Between"), shown(blocks(1)), text_part("and"), shown(blocks(2)), text_part("?")]
        reply = ask(client, user(*content))
        wanted = alone([("user", ["Between", blocks(1), "and", blocks(2), "?"])], max_new_tokens=24)
        assert text_of(reply) == wanted.text
        assert reply.usage.prompt_tokens == wanted.tokens_in
        other = alone([("user", ["Between", blocks(2), "and", blocks(1), "?"])], max_new_tokens=24)
        assert wanted.text != other.text

    def test_a_conversation_with_pictures_in_two_turns(self, client, image, alone):
        messages = [user(shown(image), text_part(QUESTION))]
        first = ask(client, *messages, model="uniform")
        messages += [first.choices[0].message, user(shown(blocks(3)), text_part("And the colour?"))]
        second = ask(client, *messages, model="uniform")
        told = [("user", [image, QUESTION]), ("assistant", text_of(first))]
        wanted = alone([*told, ("user", [blocks(3), "And the colour?"])], "uniform")
        assert text_of(second) == wanted.text
        assert len(second.visprune["keep_indices"]) == 2
        assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1

    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_an_instruction(self, client, alone, role):
        reply = ask(client, {"role": role, "content": "Be brief."}, user("Tell me."))
        assert (
            text_of(reply) == alone([("system", "Be brief."), ("user", "Tell me.")], max_new_tokens=24).text
        )
        assert text_of(reply) != text_of(ask(client, user("Tell me.")))

    def test_an_answer_begun(self, client, image, alone):
        whole = alone([("user", [image, "Where is the digit?"])], "uniform").text
        begun = whole.split(" right")[0]
        message = user(shown(image), text_part("Where is the digit?"))
        reply = ask(client, message, {"role": "assistant", "content": begun}, model="uniform")
        told = [("user", [image, "Where is the digit?"]), ("assistant", begun)]
        assert text_of(reply) == alone(told, "uniform").text
        assert begun + text_of(reply) == whole

    def test_parts_of_the_runtime_s_own(self, client, image):
        overlays = set()
        for fields, kept in (({"ratio": 0.5}, 72), ({"keep_tokens": 100}, 100), ({}, 15)):
            extra = {"visprune": {**fields, "overlay": True}}
            message = user(shown(image), text_part(QUESTION))
            found = ask(client, message, model="uniform", extra_body=extra).visprune
            assert (found["keep_tokens"], found["tokens_kept"]) == (kept, kept)
            overlays.update(found["overlays"])
        assert len(overlays) == 3
        for overlay in overlays:
            with Image.open(io.BytesIO(base64.b64decode(overlay.partition(",")[2]))) as drawn:
                drawn.load()


class TestEnds:
    def test_stops(self, client, alone):
        whole = alone([("user", "Tell me.")], max_new_tokens=60).text
        stops = [whole[20:22], "never said"]
        wanted = alone([("user", "Tell me.")], max_new_tokens=60, stop=stops)
        assert wanted.text == whole[: whole.index(stops[0])]
        for stop in (stops, stops[0]):
            reply = ask(client, user("Tell me."), stop=stop, max_tokens=60)
            assert text_of(reply) == wanted.text
            assert reply.choices[0].finish_reason == "stop"
            assert reply.usage.completion_tokens == len(wanted.token_ids) < 60
            assert joined(ask(client, user("Tell me."), stop=stop, stream=True, max_tokens=60)) == wanted.text

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_the_most_tokens(self, client, name):
        reply = ask(client, user("Tell me."), **{"max_tokens": openai.omit, name: 5})
        assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (5, "length")

    def test_the_end_of_the_context(self, client, alone):
        reply = ask(client, user("Tell me."), max_tokens=500)
        assert reply.choices[0].finish_reason == "length"
        assert text_of(reply) == alone([("user", "Tell me.")], max_new_tokens=500).text
        assert reply.usage.total_tokens < 500


class TestSampling:
    def test_the_same_seed_gives_the_same_answer(self, client, alone):
        answers = {}
        for seed in (1, 2, 2**63 - 1):
            sampling = Sampling(1.3, top_p=0.9, seed=seed)
            wanted = alone([("user", "Tell me.")], max_new_tokens=24, sampling=sampling).text
            for _ in range(2):
                reply = ask(client, user("Tell me."), temperature=1.3, top_p=0.9, seed=seed)
                assert text_of(reply) == wanted
            answers[seed] = wanted
        assert len(set(answers.values())) == 3

    def test_without_a_seed_answers_differ(self, client):
        assert len({text_of(ask(client, user("Tell me."), temperature=1.5)) for _ in range(4)}) > 1

    def test_the_least_top_p_is_greedy(self, client):
        greedy = text_of(ask(client, user("Tell me.")))
        assert text_of(ask(client, user("Tell me."), temperature=2, top_p=1e-9)) == greedy
        assert text_of(ask(client, user("Tell me."), temperature=0, top_p=0.3, seed=4)) == greedy


class Record(BaseModel):
    """What an answer must say. The client sends its schema."""

    model_config = ConfigDict(extra="forbid")
    shape: SHAPES
    sure: bool
    colours: Annotated[list[Literal["red", "blue"]], Field(max_length=2)]


class TestJson:
    def test_a_pydantic_model(self, client, image):
        for sampling in ({}, {"temperature": 1.5, "seed": 3}):
            reply = client.chat.completions.parse(
                model="uniform",
                messages=[user(shown(image), text_part("What shape is blue?"))],
                response_format=Record,
                max_tokens=200,
                **sampling,
            )
            assert isinstance(reply.choices[0].message.parsed, Record)
            assert reply.choices[0].finish_reason == "stop"

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_schema_and_any_object(self, client, alone, stream):
        schema = Record.model_json_schema()
        for given, form in (
            (schema, {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}}),
            ({"type": "object"}, {"type": "json_object"}),
        ):
            reply = ask(
                client, user("A shape?"), model="uniform", response_format=form, stream=stream, max_tokens=200
            )
            text = joined(reply) if stream else text_of(reply)
            assert text == alone([("user", "A shape?")], "uniform", schema=given, max_new_tokens=200).text
            if given is schema:
                jsonschema.validate(json.loads(text), schema)
            assert text.startswith("{")


def test_equals_the_command(client, tiny_bundle, demo_bundle, tmp_path, capfd):
    """The command answers in this process. Bytes of the random model are its tokens."""
    told = [user(shown(blocks(4)), text_part("What?")), {"role": "assistant", "content": "Begun"}]
    file = tmp_path / "messages.json"
    for bundle, messages in ((tiny_bundle, told), (demo_bundle, told[:1])):
        file.write_text(json.dumps(messages), encoding="utf-8")
        arguments = [str(bundle), "--messages", str(file), "--json", "--max-new-tokens", "24"]
        assert cli.run_command("run", arguments) == 0
        wanted = json.loads(capfd.readouterr().out)
        reply = ask(client, *messages, model=bundle.name)
        assert text_of(reply) == wanted["text"]
        assert reply.usage.completion_tokens == len(wanted["token_ids"])
        assert reply.usage.prompt_tokens == wanted["tokens_in"]
        assert reply.visprune["keep_indices"] == wanted["keep_indices"]


def test_clients_at_once_get_what_each_gets_alone(client, alone):
    def one(number):
        fields = {"temperature": 1.0, "seed": number} if number % 2 else {}
        content = [shown(blocks(number % 5)), text_part(f"{number}?")]
        return joined(ask(client, user(*content), stream=True, max_tokens=60, **fields))

    with ThreadPoolExecutor(2) as clients:
        texts = list(clients.map(one, range(16)))
    for number, text in enumerate(texts):
        sampling = Sampling(1.0, seed=number) if number % 2 else Sampling()
        asked = [("user", [blocks(number % 5), f"{number}?"])]
        assert text == alone(asked, max_new_tokens=60, sampling=sampling).text
