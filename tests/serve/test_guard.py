"""The web application without a server: before the models are loaded, and when a request meets a bug."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from visprune.serve.app import app_over, make_app
from visprune.serve.options import ServeOptions
from visprune.serve.service import Service


@pytest.fixture
def service(tiny_bundle):
    """A server whose models are never loaded."""
    service = Service([tiny_bundle], ServeOptions())
    yield service
    service.close()


def ask(app, method, path, body=b"{}"):
    """Send one request; return status, headers and the JSON of the reply."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    sent, parts = [], [{"type": "http.request", "body": body}]

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    with ThreadPoolExecutor(1) as pool:  # a browser of other tests has an event loop in this thread
        pool.submit(asyncio.run, app(scope, receive, send)).result()
    start, *rest = sent
    content = b"".join(part.get("body", b"") for part in rest)
    return start["status"], dict(start["headers"]), json.loads(content)


def test_before_the_models_are_loaded(service):
    app = make_app(service)
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/health/ready")):
        status, headers, body = ask(app, method, path)
        assert (status, body["error"]["code"]) == (503, "loading")
        assert int(headers[b"retry-after"]) >= 1
    assert ask(app, "GET", "/health/live")[::2] == (200, {"state": "loading"})
    assert ask(app, "GET", "/v1/models")[2]["data"][0]["id"] == "tiny"


def test_a_bug_shows_nothing_of_the_request(service, monkeypatch, capsys):
    async def buggy(body, send, record):
        raise ValueError(f"cannot deal with {body}")

    monkeypatch.setattr(service.scheduler, "check", lambda: None)
    status, _, body = ask(app_over(service, buggy), "POST", "/v1/chat/completions", b'"a secret"')
    assert (status, body["error"]["code"]) == (500, "internal_error")
    log = capsys.readouterr().err
    assert "failed with ValueError" in log
    assert "in buggy" in log
    assert "secret" not in log + json.dumps(body)
    assert " 500 internal_error " in log
