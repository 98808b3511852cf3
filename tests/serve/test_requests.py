"""The form of a request: what is taken, what changes nothing, and what is refused by its name."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

from visprune.serve.errors import Refusal
from visprune.serve.json_body import MAX_NESTING, read_json
from visprune.serve.request_forms import ChatRequest, ImagePart
from visprune.serve.requests import read_request

USER = {"role": "user", "content": "hi"}


def read(**fields):
    return read_request({"model": "m", "messages": [USER], **fields}, max_messages=10)


def refused(**fields):
    with pytest.raises(Refusal) as caught:
        read(**fields)
    assert caught.value.status == 400
    return caught.value


def named(name):
    schema = {"name": name, "schema": {}}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def parts(*given):
    return {"messages": [{"role": "user", "content": list(given)}]}


class TestFields:
    def test_every_field_of_the_client_is_known(self):
        assert set(CompletionCreateParamsStreaming.__annotations__) <= set(ChatRequest.model_fields)

    @pytest.mark.parametrize(
        ("name", "neutral", "other"),
        [
            ("n", 1, 2),
            ("store", False, True),
            ("logprobs", False, True),
            ("top_logprobs", 0, 3),
            ("presence_penalty", 0, 0.5),
            ("frequency_penalty", 0.0, -1),
            ("logit_bias", {}, {"5": 1}),
            ("tools", [], [{"type": "function"}]),
            ("tool_choice", "none", "required"),
            ("functions", [], [{"name": "f"}]),
            ("function_call", "none", {"name": "f"}),
            ("modalities", ["text"], ["text", "audio"]),
            ("service_tier", "auto", "flex"),
            ("reasoning_effort", "none", "high"),
            ("verbosity", "medium", "low"),
            ("audio", None, {"voice": "x"}),
            ("moderation", None, {}),
            ("prediction", None, {"type": "content"}),
            ("prompt_cache_options", None, {}),
            ("prompt_cache_retention", None, "24h"),
            ("web_search_options", None, {}),
        ],
    )
    def test_what_is_not_there_is_refused_unless_it_changes_nothing(self, name, neutral, other):
        read(**{name: neutral})
        read(**{name: None})
        found = refused(**{name: other})
        assert (found.code, found.param) == ("unsupported_parameter", name)
        assert name in found.message

    @pytest.mark.parametrize(
        "fields",
        [
            {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"n": "2"}},
            {"temperature": 0, "top_p": 0.5, "seed": 3, "top_k": 4, "repetition_penalty": 1.1},
            {"stop": "a"},
            {"stop": ["a", "b"]},
            {"max_tokens": 4, "max_completion_tokens": 4},
            {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
            {"response_format": {"type": "text"}},
            {"response_format": {"type": "json_object"}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {}, "strict": True},
                }
            },
            {"visprune": {"ratio": 1, "overlay": True}},
            {"visprune": {"keep_tokens": 36}},
            {"visprune": {"reuse_prefix": False}},
            {"parallel_tool_calls": True},
        ],
    )
    def test_taken(self, fields):
        read(**fields)

    @pytest.mark.parametrize(
        ("fields", "code", "param"),
        [
            ({"foo": 1}, "unknown_parameter", "foo"),
            ({"visprune": {"foo": 1}}, "unknown_parameter", "visprune.foo"),
            ({"visprune": {"ratio": 1.5}}, "invalid_value", "visprune.ratio"),
            ({"visprune": {"ratio": 0}}, "invalid_value", "visprune.ratio"),
            ({"visprune": {"ratio": 0.5, "keep_tokens": 3}}, "invalid_value", "visprune.keep_tokens"),
            ({"visprune": {"reuse_prefix": 0}}, "invalid_value", "visprune.reuse_prefix"),
            ({"visprune": 3}, "invalid_value", "visprune"),
            ({"temperature": "1"}, "invalid_value", "temperature"),
            ({"temperature": -1}, "invalid_value", "temperature"),
            ({"temperature": 2.1}, "invalid_value", "temperature"),
            ({"top_p": 0}, "invalid_value", "top_p"),
            ({"seed": -1}, "invalid_value", "seed"),
            ({"max_tokens": 0}, "invalid_value", "max_tokens"),
            ({"max_tokens": 1.0}, "invalid_value", "max_tokens"),
            ({"max_tokens": True}, "invalid_value", "max_tokens"),
            ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
            ({"stop": 5}, "invalid_value", "stop"),
            ({"stop": ["a"] * 17}, "invalid_value", "stop"),
            ({"stop": [5]}, "invalid_value", "stop[0]"),
            ({"stream": 1}, "invalid_value", "stream"),
            ({"stream_options": {}}, "invalid_value", "stream_options"),
            ({"model": None}, "invalid_value", "model"),
            ({"messages": None}, "invalid_value", "messages"),
            ({"messages": []}, "invalid_value", "messages"),
            ({"messages": [5]}, "invalid_value", "messages[0]"),
            ({"messages": [USER] * 11}, "too_many_messages", "messages"),
            (parts(*[{"type": "text", "text": "a"}] * 11), "too_many_messages", "messages"),
            ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format.type"),
            ({"response_format": {}}, "missing_parameter", "response_format.type"),
            ({"max_tokens": 10**4000}, "invalid_value", "max_tokens"),
            ({"repetition_penalty": 1e-300}, "invalid_value", "repetition_penalty"),
            ({"type:text": 1}, "unknown_parameter", '["type:text"]'),
            ({"": 1}, "unknown_parameter", '[""]'),
            ({"visprune": {"a:b": 1}}, "unknown_parameter", 'visprune["a:b"]'),
            ({"metadata": {"a:b": 5}}, "invalid_value", 'metadata["a:b"]'),
            ({"metadata": {"name": 5}}, "invalid_value", "metadata.name"),
            ({"half \ud800": 1}, "unknown_parameter", None),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a" * 65, "schema": {}}}},
                "invalid_value",
                "response_format.json_schema.name",
            ),
            (
                parts({"type": "image_url", "image_url": "a.png"}),
                "invalid_value",
                "messages[0].content[0].image_url",
            ),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
                "missing_parameter",
                "response_format.json_schema.schema",
            ),
        ],
    )
    def test_refused_by_name(self, fields, code, param):
        found = refused(**fields)
        assert (found.code, found.param) == (code, param)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"messages": []}, "messages is an empty list. Send at least one message."),
            (
                {"messages": [{"role": "user", "content": []}]},
                "messages[0].content is an empty list. Send at least one part.",
            ),
            (
                {"messages": [{"role": "user", "content": None}]},
                "messages[0].content is null. Send a text, or a list of parts.",
            ),
            ({"stop": 5}, "stop is 5. Send a text, or a list of texts."),
            ({"user": 5}, "user is 5. Send a text."),
            ({"metadata": {"content": 5}}, "metadata.content is 5. Send a text."),
            (
                parts({"type": "painting"}),
                'messages[0].content[0].type is "painting", which is not supported. Use text or image_url.',
            ),
            (
                {"response_format": {}},
                "response_format.type is missing. Use text, json_object or json_schema.",
            ),
            (
                {"messages": [{"role": "system", "content": [{"type": "image_url"}]}]},
                'messages[0].content[0].type is "image_url". Pictures are taken in messages of the role '
                'user. Send parts of the type "text".',
            ),
            (
                {"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]},
                'messages[0].content[0].type is "refusal". Send parts of the type "text".',
            ),
            ({"messages": {"a": 1}}, "messages is an object of 1. Send a list."),
            ({"temperature": 2.1}, "temperature is 2.1. Send a number of at most 2.0."),
            ({"temperature": -1}, "temperature is -1. Send a number of at least 0.0."),
            ({"temperature": "1"}, 'temperature is "1". Send a number.'),
            ({"top_p": 0}, "top_p is 0. Send a number above 0.0."),
            ({"max_tokens": 1.0}, "max_tokens is 1.0. Send a whole number."),
            ({"seed": 2**63}, f"seed is {2**63}. Send a number below {2**63}."),
            ({"stop": ["a"] * 17}, "stop is a list of 17. Send at most 16."),
            ({"stop": [5]}, "stop[0] is 5. Send a text."),
            ({"stream": 1}, "stream is 1. Send true or false."),
            ({"top_p": float("inf")}, "top_p is Infinity. Send a finite number."),
            (
                named("a" * 65),
                f'response_format.json_schema.name is "{"a" * 59}.... Send at most 64 characters.',
            ),
            (named(""), 'response_format.json_schema.name is "". Send a text that is not empty.'),
        ],
    )
    def test_a_sentence_says_what_is_taken(self, fields, message):
        assert refused(**fields).message == message

    def test_a_missing_field(self):
        with pytest.raises(Refusal, match="model is missing"):
            read_request({"messages": [USER]}, 10)

    def test_a_message_never_repeats_a_picture(self):
        found = refused(stop={"a": "b" * 10_000}, temperature="x" * 10_000)
        assert len(found.message) < 300


class TestMessages:
    def test_an_answer_may_be_sent_back_as_it_came(self):
        answer = ChatCompletionMessage(role="assistant", content="x").model_dump()
        request = read(messages=[USER, answer, USER])
        assert request.messages[1].content == "x"

    @pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
    def test_an_answer_without_a_text(self, content):
        request = read(messages=[USER, {"role": "assistant", **content}, USER])
        assert request.messages[1].content == ""

    def test_a_developer_and_parts(self):
        request = read(
            messages=[
                {"role": "developer", "content": "be short"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "image_url", "image_url": {"url": "data:,", "detail": "auto"}},
                    ],
                },
            ]
        )
        assert isinstance(request.messages[1].content[1], ImagePart)

    @pytest.mark.parametrize(
        ("messages", "code", "param"),
        [
            ([{"role": "tool", "content": "x"}], "unsupported_parameter", "messages[0].role"),
            ([USER, {"role": "function", "content": "x"}], "unsupported_parameter", "messages[1].role"),
            ([{"role": "wizard", "content": "x"}], "invalid_value", "messages[0].role"),
            ([{"role": ["user"], "content": "x"}], "invalid_value", "messages[0].role"),
            ([{"content": "x"}], "missing_parameter", "messages[0].role"),
            ([{"role": "user"}], "missing_parameter", "messages[0].content"),
            ([{"role": "user", "content": None}], "invalid_value", "messages[0].content"),
            ([{"role": "user", "content": []}], "invalid_value", "messages[0].content"),
            ([{**USER, "name": "Bob"}], "unsupported_parameter", "messages[0].name"),
            (
                [USER, {"role": "assistant", "content": "x", "tool_calls": [1]}],
                "unsupported_parameter",
                "messages[1].tool_calls",
            ),
            (
                [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                "invalid_value",
                "messages[0].content[0].type",
            ),
        ],
    )
    def test_roles_and_contents(self, messages, code, param):
        found = refused(messages=messages)
        assert (found.code, found.param) == (code, param)

    @pytest.mark.parametrize(
        ("part", "code", "place"),
        [
            ({"type": "video_url", "video_url": {}}, "unsupported_parameter", "type"),
            ({"type": "input_audio"}, "unsupported_parameter", "type"),
            ({"type": "file"}, "unsupported_parameter", "type"),
            ({"type": "painting"}, "invalid_value", "type"),
            ({"text": "x"}, "missing_parameter", "type"),
            ({"type": "text"}, "missing_parameter", "text"),
            ({"type": "text", "text": 5}, "invalid_value", "text"),
            ({"type": "text", "text": "a", "foo": 1}, "unknown_parameter", "foo"),
            ({"type": "image_url"}, "missing_parameter", "image_url"),
            ({"type": "image_url", "image_url": "x"}, "invalid_value", "image_url"),
            ({"type": "image_url", "image_url": {"url": 5}}, "invalid_value", "image_url.url"),
            (
                {"type": "image_url", "image_url": {"url": "x", "detail": "high"}},
                "unsupported_parameter",
                "image_url.detail",
            ),
        ],
    )
    def test_parts(self, part, code, place):
        found = refused(**parts({"type": "text", "text": "a"}, part))
        assert (found.code, found.param) == (code, f"messages[0].content[1].{place}")


class TestBody:
    @pytest.mark.parametrize(
        ("body", "what"),
        [
            (b"", "not JSON"),
            (b"{", "not JSON"),
            (b"[1]", "not an object"),
            (b"5", "not an object"),
            (b'{"a": NaN}', "not finite"),
            (b'{"a": -Infinity}', "not finite"),
            (b'{"a": ' + b"9" * 5000 + b"}", "too long"),
            (b'{"a": "\xff"}', "not UTF-8"),
            ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
            (b"\xef\xbb\xbf{}", "not JSON"),
            (b'{"a":' * (MAX_NESTING + 1) + b"1" + b"}" * (MAX_NESTING + 1), "deep"),
            (b"[" * 100_000, "deep"),
            (b"[" * 1_000_000, "parts"),
            (b'{"a": [' + b"{}," * 300_000 + b"{}]}", "parts"),
            (b'{"a": "' + b'\\"' * 300_000 + b'"}', "parts"),
        ],
    )
    def test_refused(self, body, what):
        with pytest.raises(Refusal, match=what) as caught:
            read_json(body)
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")

    def test_taken(self):
        text = "[{" * 100 + '\\" {[ ü \\\\'
        value = {"a": text, "b": [[{}] * 3] * 3, "c": "\\" * 1000, 'k"{': '"'}
        assert read_json(json.dumps(value).encode()) == value
        assert read_json(json.dumps(value, ensure_ascii=False).encode()) == value
        deep: dict = {}
        for _ in range(MAX_NESTING - 1):
            deep = {"a": deep}
        assert read_json(json.dumps(deep).encode()) == deep
        assert read_json(b'{"a": 1, "a": 2}') == {"a": 2}
