"""What each path gives, and the answers and refusals of chat completions."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import data_url, picture_part, text_part

import visprune
from visprune.bundle import Bundle
from visprune.bundled import IMAGE

QUESTION = "What is the letter?"


DOCS = Path(__file__).resolve().parents[2] / "docs"


def begun(content):
    """A question and the beginning of its answer."""
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]}


def _schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


@pytest.fixture(scope="module")
def pipeline(demo_bundle):
    with visprune.load(demo_bundle) as pipeline:
        yield pipeline


class TestPaths:
    def test_models(self, server, demo_bundle):
        listed = server.get("/v1/models").json
        (model,) = listed["data"]
        assert (listed["object"], model["object"], model["id"]) == ("list", "model", demo_bundle.name)
        manifest = Bundle.open(demo_bundle).manifest
        assert model["visprune"] == {
            "method": "uniform",
            "inside_llm": None,
            "visual_tokens": 144,
            "keep_tokens": 15,
            "ratio": round(15 / 144, 6),
            "unit": "token",
            "context_length": manifest.decoder.context_length,
            "precision": "float32",
            "needs_auth": False,
        }
        assert server.get(f"/v1/models/{demo_bundle.name}").json == model

    def test_an_unknown_model(self, server):
        for reply in (server.get("/v1/models/none"), server.chat(model="none")):
            assert (reply.status, reply.error["code"]) == (404, "model_not_found")
            assert "uniform" in reply.error["message"]

    def test_health(self, server):
        for path in ("/health/live", "/health/ready"):
            assert server.get(path).json == {"state": "ready"}
            assert server.request("HEAD", path).status == 200

    def test_metrics(self, server):
        reply = server.get("/metrics")
        assert reply.headers["Content-Type"].startswith("text/plain")
        before = server.metric('visprune_refusals_total{code="unknown_parameter"}')
        assert server.chat(foo=1).status == 400
        assert server.metric('visprune_refusals_total{code="unknown_parameter"}') == before + 1

    @pytest.mark.parametrize(
        ("method", "path", "status", "code"),
        [
            ("GET", "/nothing", 404, "not_found"),
            ("GET", "/v1", 404, "not_found"),
            ("GET", "/v1/models/", 404, "model_not_found"),
            ("POST", "/v1/completions", 404, "not_found"),
            ("GET", "/redoc", 404, "not_found"),
            ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
            ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed"),
            ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ],
    )
    def test_no_such_path_or_method(self, server, method, path, status, code):
        reply = server.request(method, path)
        assert (reply.status, reply.error["code"]) == (status, code)
        assert (status == 405) == ("Allow" in reply.headers)

    def test_the_description_is_complete(self, server):
        document = server.get("/openapi.json").json
        text = json.dumps(document)
        schemas = document["components"]["schemas"]
        for name in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
            assert name in schemas
        for path, item in document["paths"].items():
            for method in set(item) - {"parameters"}:
                filled = path.replace("{name}", "uniform")
                assert server.request(method.upper(), filled).status in (200, 415)
        assert schemas["ChatRequest"]["additionalProperties"] is False
        refused = document["paths"]["/v1/chat/completions"]["post"]["responses"]
        listed = re.findall(r"^\| (\d{3}(?:, \d{3})*) \| `", (DOCS / "serve.md").read_text(), re.MULTILINE)
        assert set(", ".join(listed).split(", ")) == set(refused) - {"200"}
        fields = schemas["ChatRequest"]["properties"]
        assert [fields[name]["anyOf"][0] for name in ("n", "top_logprobs")] == [{"const": 1}, {"const": 0}]
        assert not re.search(r"\d{16}", text)  # JavaScript would round it


class TestAnswers:
    def test_equals_the_runtime_token_for_token(self, server, pipeline, scene):
        reply = server.chat([picture_part(scene), text_part(QUESTION)])
        wanted = pipeline.generate(IMAGE, QUESTION, max_new_tokens=8)
        (choice,) = reply.json["choices"]
        assert choice["message"]["content"] == wanted.text
        assert choice["finish_reason"] == "stop"
        usage = reply.json["usage"]
        assert usage["prompt_tokens"] == wanted.tokens_in
        assert usage["completion_tokens"] == len(wanted.token_ids)
        assert usage["total_tokens"] == wanted.tokens_in + len(wanted.token_ids)
        figures = reply.json["visprune"]
        assert figures["keep_indices"] == [list(kept) for kept in wanted.keep_indices]
        assert (figures["visual_tokens"], figures["tokens_kept"], figures["keep_tokens"]) == (144, 15, 15)
        assert {"preprocess", "vision_encoder", "prefill", "total"} <= set(figures["timings_ms"])
        assert "overlays" not in figures

    @pytest.mark.parametrize("fields", [{"ratio": 0.5}, {"keep_tokens": 72}])
    def test_another_ratio(self, server, pipeline, scene, fields):
        reply = server.chat([text_part(QUESTION), picture_part(scene)], visprune=fields)
        wanted = pipeline.generate(IMAGE, QUESTION, max_new_tokens=8, keep_tokens=72)
        assert reply.json["visprune"]["keep_indices"] == [list(kept) for kept in wanted.keep_indices]
        assert reply.json["visprune"]["keep_tokens"] == 72

    def test_overlay(self, server, pipeline, scene):
        reply = server.chat([picture_part(scene), text_part(QUESTION)], visprune={"overlay": True})
        figures = reply.json["visprune"]
        (overlay,) = figures["overlays"]
        kind, _, data = overlay.partition(",")
        assert kind == "data:image/png;base64"
        drawn = Image.open(io.BytesIO(base64.b64decode(data)))
        wanted = pipeline.overlay(IMAGE, figures["keep_indices"][0])
        assert drawn.convert("RGB").tobytes() == wanted.tobytes()

    def test_streamed(self, server, scene):
        asked = {"content": [picture_part(scene), text_part(QUESTION)]}
        whole = server.chat(**asked).json
        reply = server.chat(**asked, stream=True, stream_options={"include_usage": True})
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        *chunks, usage, done = reply.events
        assert done == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == whole["choices"][0]["message"]["content"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["visprune"]["keep_indices"] == whole["visprune"]["keep_indices"]
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert all("usage" not in chunk for chunk in chunks)
        assert len(server.chat(**asked, stream=True).events) == len(chunks) + 1

    def test_length(self, server):
        reply = server.chat("Tell me.", max_tokens=1)
        assert reply.json["choices"][0]["finish_reason"] == "length"
        assert reply.json["usage"]["completion_tokens"] == 1
        assert server.chat("Tell me.", max_tokens=None, max_completion_tokens=1).json["usage"] == {
            **reply.json["usage"],
            "prompt_tokens_details": {"cached_tokens": reply.json["usage"]["prompt_tokens"] - 1},
        }

    def test_a_seed_repeats(self, server):
        texts = [
            server.chat("Tell me.", temperature=2, seed=7, max_tokens=8).json["choices"][0]["message"]
            for _ in range(3)
        ]
        assert texts[0] == texts[1] == texts[2]

    def test_an_answer_that_is_begun_is_continued(self, server, scene):
        content = [picture_part(scene), text_part(QUESTION)]
        whole = server.chat(content).json["choices"][0]["message"]["content"]
        begun = [{"role": "user", "content": content}, {"role": "assistant", "content": whole[:2]}]
        assert server.chat(messages=begun).json["choices"][0]["message"]["content"] == whole[2:]

    def test_stops(self, server, pipeline, scene):
        content = [picture_part(scene), text_part(QUESTION)]
        whole = pipeline.generate(IMAGE, QUESTION).text
        for stop in (whole[-1], [whole[-1], "never"]):
            (choice,) = server.chat(content, stop=stop).json["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (whole[:-1], "stop")

    @pytest.mark.parametrize("stream", [False, True])
    def test_json(self, server, stream):
        schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
        schema["additionalProperties"] = False
        reply = server.chat("A number?", response_format=_schema(schema), max_tokens=60, stream=stream)
        if stream:
            chunks = reply.events[:-1]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        else:
            text = reply.json["choices"][0]["message"]["content"]
        assert json.loads(text)["n"] in (1, 2)

    def test_what_was_computed_is_not_computed_again(self, server):
        content = [picture_part(noise(3)), text_part(QUESTION)]
        first, again = server.chat(content).json, server.chat(content).json
        assert first["visprune"]["cached"]["images"] == 0
        assert first["visprune"]["cached"]["tokens"] < 15  # fewer than the picture has
        assert again["visprune"]["cached"]["tokens"] == again["usage"]["prompt_tokens"] - 1
        assert first["choices"] == again["choices"]
        details = again["usage"]["prompt_tokens_details"]
        assert details == {"cached_tokens": again["visprune"]["cached"]["tokens"]}
        other = server.chat(content, visprune={"ratio": 0.5}).json
        assert other["visprune"]["cached"]["images"] == 1

    def test_the_whole_prompt_is_computed_if_that_is_asked_for(self, server):
        content = [picture_part(noise(4)), text_part(QUESTION)]
        fields = {"visprune": {"reuse_prefix": False}}
        first, again = server.chat(content).json, server.chat(content, **fields).json
        assert again["visprune"]["cached"] == {"tokens": 0, "images": 1}
        assert again["choices"] == first["choices"]
        assert server.chat(content, visprune={"reuse_prefix": True}).json["visprune"]["cached"]["tokens"] > 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "code", "param"),
        [
            ({"n": 2}, "unsupported_parameter", "n"),
            ({"foo": 1}, "unknown_parameter", "foo"),
            ({"max_tokens": 513}, "invalid_value", "max_tokens"),
            ({"visprune": {"keep_tokens": 145}}, "invalid_request", "visprune.keep_tokens"),
            ({"messages": [{"role": "user", "content": ""}]}, "invalid_request", "messages"),
            ({"messages": [{"role": "system", "content": "x"}]}, "invalid_request", "messages"),
            (begun(""), "invalid_request", "messages"),
            (begun(None), "invalid_request", "messages"),
            ({**begun("x"), "response_format": _schema({})}, "invalid_request", "response_format"),
            ({"response_format": _schema({"type": "strange"})}, "invalid_request", "response_format"),
            ({"response_format": _schema({"$ref": "http://a/"})}, "invalid_request", "response_format"),
            ({"stop": ""}, "invalid_request", "stop"),
            ({"stop": ["a", "</s>."]}, "invalid_request", "stop"),
            ({"content": "word " * 2000}, "invalid_request", "messages"),
            ({"content": "half \ud800"}, "invalid_request", "messages"),
        ],
    )
    def test_by_name(self, server, fields, code, param):
        reply = server.chat(**fields)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (400, code, param)
        assert reply.error["type"] == "invalid_request_error"
        assert server.chat(**fields, stream=True).json == reply.json

    @pytest.mark.parametrize(
        ("url", "what"),
        [
            ("data:image/png;base64,aGVsbG8=", "not a picture in a known format"),
            ("data:image/png;base64,?", "not base64"),
            ("data:image/png;base64,", "holds no data"),
            ("data:", "holds no data"),
        ],
    )
    def test_a_picture_that_is_none(self, server, url, what):
        """All have one code, and no advice for users of the runtime, who may give paths."""
        reply = server.chat([text_part("a"), picture_part(url)])
        assert reply.error["param"] == "messages[0].content[1].image_url.url"
        assert (reply.status, what in reply.error["message"]) == (400, True)
        assert reply.error["code"] == "invalid_image"
        assert not {"path", "bytes"} & set(reply.error["message"].rstrip(".").split())

    def test_a_picture_of_another_format(self, server):
        """The formats that the sentence lists are those of the documentation."""
        told = server.chat([picture_part("data:,hello"), text_part("a")]).error["message"]
        line = re.search(r"- (JPEG, .*) are read, no other", (DOCS / "run.md").read_text()).group(1)
        assert f"Give a {line.replace(' and ', ' or ')} picture." in told

    def test_too_many_pictures(self, server):
        reply = server.chat([picture_part(noise(0))] * 9)
        assert (reply.status, reply.error["code"]) == (400, "too_many_images")

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages": NaN}'])
    def test_a_body_that_is_no_object(self, server, body):
        reply = server.request("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.error["code"]) == (400, "invalid_json")

    @pytest.mark.parametrize(
        "headers",
        [
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
            {"Content-Encoding": "gzip"},
            {"Content-Type": ""},
        ],
    )
    def test_another_type(self, server, headers):
        reply = server.request("POST", "/v1/chat/completions", b"{}", headers)
        assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")


def noise(seed):
    """Return the data: URL of a picture that no other test has."""
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    return data_url(Image.fromarray(pixels))
