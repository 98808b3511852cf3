"""The web application: which path gives what.

It is an ASGI application that any server can run. It knows nothing of sockets and signals; `server` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from visprune.serve import refusals
from visprune.serve.answer_forms import ModelList
from visprune.serve.completions import Answering, Completion, answer
from visprune.serve.errors import Refusal
from visprune.serve.guard import Guard, record_of, refusal_headers
from visprune.serve.limits import Hosts
from visprune.serve.openapi import describe
from visprune.serve.page_files import page_files
from visprune.serve.replies import json_bytes
from visprune.serve.service import Front, Service

__all__ = ["app_over", "make_app"]

_ANY = ["GET", "HEAD"]
_STOP = 10.0  # seconds that the thread of the models gets to end
_JSON = "application/json"


def make_app(service: Service) -> Guard:
    """Return the web application of a server. Its lifespan starts the models, and stops them at the end."""
    return app_over(service, partial(answer, service))


def app_over(front: Front, answering: Answering) -> Guard:
    """Return the web application of a server whose requests are answered by any means.

    Args:
        front: The server.
        answering: Answers requests for completions.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        front.scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(front.close, _STOP)

    # FastAPI's own pages load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _no_such_path)
    app.add_exception_handler(Exception, _failed)
    _add_api(app, front, answering)
    _add_health(app, front)
    _add_page(app)
    return Guard(app, front.keys, Hosts.of(front.options, have_keys=front.keys.any), front.metrics)


def _add_api(app: FastAPI, front: Front, answering: Answering) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        found = ModelList(data=list(front.cards.values()))
        return Response(json_bytes(found.model_dump()), media_type=_JSON)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in front.cards:
            raise refusals.model_not_found(name, list(front.cards))
        return Response(json_bytes(front.cards[name].model_dump()), media_type=_JSON)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return Completion(front, answering)

    document = json_bytes(describe())

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(document, media_type=_JSON)


def _add_health(app: FastAPI, front: Front) -> None:
    @app.api_route("/health/live", methods=_ANY)
    async def live() -> Response:
        return Response(json_bytes({"state": front.scheduler.state}), media_type=_JSON)

    @app.api_route("/health/ready", methods=_ANY)
    async def ready() -> Response:
        front.scheduler.check()
        return Response(json_bytes({"state": front.scheduler.state}), media_type=_JSON)

    @app.get("/metrics")
    async def metrics() -> Response:
        body, kind = front.metrics.render()
        return Response(body, headers={"content-type": kind})


def _add_page(app: FastAPI) -> None:
    files = page_files()

    def reply(name: str) -> Response:
        found = files.get(name)
        if found is None:
            raise _not_found()
        return Response(found.content, headers={"content-type": found.kind})

    @app.api_route("/", methods=_ANY)
    async def page() -> Response:
        return reply("index.html")

    @app.api_route("/docs", methods=_ANY)
    async def docs() -> Response:
        return reply("docs.html")

    @app.api_route("/page/{name:path}", methods=_ANY)
    async def page_file(name: str) -> Response:
        return reply(name)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    record_of(request.scope).code = error.code
    headers = {name.decode(): value.decode() for name, value in refusal_headers(error)}
    return Response(json_bytes(error.body()), error.status, headers, _JSON)


async def _no_such_path(request: Request, error: Exception) -> Response:
    """Answer for a path that is not there, or a method that it does not have, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    refusal = _not_found()
    if error.status_code == 405:
        refusal = Refusal(
            405, "method_not_allowed", "This path does not have this method. /docs lists what there is."
        )
    response = await _refused(request, refusal)
    response.headers.update(error.headers or {})  # Allow
    return response


async def _failed(request: Request, error: Exception) -> Response:
    """Answer for an error that is a bug. The guard reports it."""
    return await _refused(request, refusals.internal_error())


def _not_found() -> Refusal:
    return Refusal(404, "not_found", "There is nothing at this path. /docs lists what there is.")
