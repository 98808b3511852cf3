"""The classes of errors that OpenAI's client raises for the server's refusals."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import openai
import pytest
from serving import picture_part, serving, text_part

KEY = "kitchen-8d1c0b"


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY, encoding="utf-8")
    options = "--max-active 1 --max-queue 1 --max-body 100kB --max-connections 8 --client-timeout 60"
    with serving([tiny_bundle], *options.split(), "--api-key-file", str(keys), key=KEY) as served:
        yield served
        assert "which is a bug" not in "\n".join(served.lines)


@pytest.fixture
def client(server):
    with connected(server) as client:
        yield client


@contextmanager
def connected(server, key=KEY, retries=0):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=retries) as client:
        yield client


def ask(client, content="Tell me.", **fields):
    fields = {"model": "tiny", "max_tokens": 8, **fields}
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **fields)


def refused(error, client, content="Tell me.", **fields):
    """The error of a request; it is the same when the answer would be streamed."""
    found = []
    for stream in (False, True):
        with pytest.raises(error) as caught:
            ask(client, content, stream=stream, **fields)
        found.append(caught.value)
    assert str(found[0]) == str(found[1])
    assert found[0].body["message"]
    return found[0]


def test_a_wrong_key(server):
    with connected(server, "wrong") as client:
        error = refused(openai.AuthenticationError, client)
        assert (error.code, error.type) == ("invalid_api_key", "authentication_error")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_another_model(client):
    error = refused(openai.NotFoundError, client, model="gpt-5")
    assert (error.code, error.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"foo": 1}}, "foo"),
        ({"extra_body": {"visprune": {"ratio": 2}}}, "visprune.ratio"),
        ({"content": [picture_part("https://example.com/cat.png")]}, "messages[0].content[0].image_url.url"),
        ({"content": [text_part("a"), {"type": "input_audio"}]}, "messages[0].content[1].type"),
        ({"content": "word " * 500}, "messages"),
        ({"stop": ""}, "stop"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_a_bad_request_names_its_field(client, fields, param):
    error = refused(openai.BadRequestError, client, **fields)
    assert (error.param, error.type) == (param, "invalid_request_error")


def test_a_full_queue(server):
    """A request takes its place before its body is read, so two that do not send theirs fill the server."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    slow = f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n".encode()
    with connected(server) as client, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(server.raw()).sendall(slow)
            server.get("/health/live")
        error = refused(openai.RateLimitError, client)
        assert (error.code, error.type) == ("queue_full", "rate_limit_error")
        assert int(error.response.headers["retry-after"]) >= 1
    with connected(server, retries=5) as client:  # waits as long as it is told to
        assert ask(client).usage.completion_tokens == 8


def test_too_many_connections(server):
    with ExitStack() as stack, connected(server) as client:
        for _ in range(8):
            stack.enter_context(server.raw())
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
    assert (caught.value.status_code, caught.value.code) == (503, "too_many_connections")
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_what_has_no_class_of_its_own(client):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, "a" * 200_000)
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    with pytest.raises(openai.PermissionDeniedError) as caught:
        ask(client, extra_headers={"Origin": "https://evil.example"})
    assert caught.value.code == "cross_site"


def test_answers_that_break_off(tiny_bundle):
    """The server ends while answers stream: what comes after the pieces is an error, and no end."""
    begun = threading.Event()

    def one(_):
        pieces = []
        try:
            for chunk in ask(client, max_tokens=200, stream=True):
                pieces.append(chunk)
                begun.set()
        except openai.APIError as error:
            return error.code, type(error) if pieces else isinstance(error, openai.InternalServerError)
        return pieces[-1].choices[0].finish_reason

    options = ("--drain-timeout", "0", "--max-queue", "20")
    with serving([tiny_bundle], *options) as served, connected(served) as client:
        with ThreadPoolExecutor(20) as clients:
            outcomes = clients.map(one, range(20))
            assert begun.wait(60)
            served.process.send_signal(signal.SIGTERM)
            outcomes = list(outcomes)
        assert ("draining", openai.APIError) in outcomes
        assert set(outcomes) <= {"length", ("draining", openai.APIError), ("draining", True)}
        assert served.process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
