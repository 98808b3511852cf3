"""The description of the API in OpenAPI 3.1, made of the same forms that read requests and write answers."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from visprune.serve.answer_forms import ChatCompletion, ChatCompletionChunk, ErrorBody, ModelCard, ModelList
from visprune.serve.request_forms import ChatRequest
from visprune.version import __version__

__all__ = ["describe"]

_FORMS = (ChatRequest, ChatCompletion, ChatCompletionChunk, ErrorBody, ModelCard, ModelList)
_REFUSED = {
    "400": "The request cannot be answered; `param` names the field.",
    "401": "There is no key, or an unknown one.",
    "403": "A page of another site made the request in a browser.",
    "404": "There is no such model.",
    "405": "The path does not have this method; the header Allow lists those that it has.",
    "408": "The request did not arrive in time.",
    "413": "The request is too large.",
    "415": "The request is not JSON.",
    "421": "The header Host has a name that the server does not know.",
    "429": "The queue is full. Try again after the seconds of Retry-After.",
    "431": "The head of the request is too long.",
    "500": "The server failed.",
    "503": "The server loads its models or shuts down, or the request waited too long. See Retry-After.",
    "504": "The answer took too long.",
}


def describe() -> dict[str, Any]:
    """Return the document."""
    _, schemas = models_json_schema(
        [(form, "validation") for form in _FORMS], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "visprune", "version": __version__},
        "paths": {
            "/v1/models": {"get": _operation("List the models", {"200": _json(ModelList)}, "401")},
            "/v1/models/{name}": {
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
                "get": _operation("Describe a model", {"200": _json(ModelCard)}, "401", "404"),
            },
            "/v1/chat/completions": {"post": _completion()},
            "/health/live": {"get": _open("Say that the process runs", "200")},
            "/health/ready": {"get": _open("Say whether requests are answered", "200", "503")},
            "/metrics": {
                "get": _operation(
                    "Give the figures for Prometheus",
                    {"200": {"description": "Figures.", "content": {"text/plain": {}}}},
                    "401",
                )
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _completion() -> dict[str, Any]:
    whole = _json(ChatCompletion)
    whole["content"]["text/event-stream"] = {
        "schema": {
            "type": "string",
            "description": "With stream: true, events whose data are ChatCompletionChunk, and then [DONE].",
        }
    }
    found = _operation("Answer a conversation", {"200": whole}, *_REFUSED)
    found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(ChatRequest)}}}
    return found


def _operation(summary: str, responses: dict[str, Any], *refused: str) -> dict[str, Any]:
    refusals = {status: {**_json(ErrorBody), "description": _REFUSED[status]} for status in refused}
    return {"summary": summary, "responses": responses | refusals}


def _open(summary: str, *statuses: str) -> dict[str, Any]:
    """Return an operation that needs no key."""
    responses = {
        status: {"description": "The state.", "content": {"application/json": {}}} for status in statuses
    }
    return {"summary": summary, "responses": responses, "security": [{}]}


def _json(form: type) -> dict[str, Any]:
    return {"description": form.__doc__, "content": {"application/json": {"schema": _ref(form)}}}


def _ref(form: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{form.__name__}"}
