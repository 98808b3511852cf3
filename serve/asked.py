"""The preparation of a request, in threads, so that the event loop goes on meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from visprune.serve.conversation import check_request, image_urls, make_turn, read_images
from visprune.serve.json_body import read_json
from visprune.serve.request_forms import ChatRequest, TextPart
from visprune.serve.requests import read_request
from visprune.serve.service import Service

if TYPE_CHECKING:
    from visprune.runtime import Pipeline, Turn

__all__ = ["Asked", "prepare"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is left of a request when it is queued: its body and its decoded pictures take no memory any more.

    Attributes:
        model: Name of the model.
        pipeline: The model.
        turn: The prepared turn.
        stream: Whether the answer is streamed.
        usage: Whether a stream ends with the usage.
        files: Files of its pictures, if they are to be drawn with the answer; or None.
        texts: The texts of its messages, if they are to be logged; or None.
    """

    model: str
    pipeline: Pipeline
    turn: Turn
    stream: bool
    usage: bool
    files: tuple[bytes, ...] | None
    texts: list[list[str]] | None


async def prepare(service: Service, body: bytes) -> Asked:
    """Read a request, with its pictures, and prepare its turn.

    Raises:
        Refusal: It cannot be answered, or the server does not run.
    """
    options, pictures = service.options, service.pictures
    request = await service.work(lambda: read_request(read_json(body), options.max_messages))
    pipeline = service.scheduler.pipeline(request.model)
    await service.work(lambda: check_request(request, pipeline, options))
    fetched = any(url[:4].lower() == "http" for _, url in image_urls(request))
    files = await (service.fetch if fetched else service.work)(lambda: read_images(request, pictures))
    turn = await service.work(lambda: make_turn(request, pipeline, files, pictures, options.max_tokens))
    return Asked(
        request.model,
        pipeline,
        turn,
        stream=bool(request.stream),
        usage=bool(request.stream_options and request.stream_options.include_usage),
        files=tuple(files) if request.visprune and request.visprune.overlay else None,
        texts=_texts(request) if options.log_prompts else None,
    )


def _texts(request: ChatRequest) -> list[list[str]]:
    return [
        [message.content]
        if isinstance(message.content, str)
        else [part.text for part in message.content if isinstance(part, TextPart)]
        for message in request.messages
    ]
