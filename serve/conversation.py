"""From a request to a turn of the runtime: its messages with their pictures, and how to answer them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from visprune.errors import InputError, MissingExtraError, UnsupportedError, VispruneError
from visprune.serve.errors import Refusal, refusal_of
from visprune.serve.options import ServeOptions
from visprune.serve.pictures import PictureReader
from visprune.serve.request_forms import ChatRequest, ImagePart, SchemaFormat, TextFormat

if TYPE_CHECKING:
    from PIL import Image

    from visprune.runtime import Pipeline, Sampling, Turn
    from visprune.runtime.structured import JsonSchema

__all__ = ["check_request", "image_urls", "make_turn", "read_images"]


def image_urls(request: ChatRequest) -> list[tuple[str, str]]:
    """Return the pictures of a request in order: the name of the field, and the URL in it."""
    return [
        (f"messages[{i}].content[{k}].image_url.url", part.image_url.url)
        for i, message in enumerate(request.messages)
        if not isinstance(message.content, str)
        for k, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def check_request(request: ChatRequest, pipeline: Pipeline, options: ServeOptions) -> None:
    """Refuse what the limits or the model do not allow, before any picture is read.

    Raises:
        Refusal: 400, with the field that is at fault.
    """
    from visprune.runtime.vision.kept_tokens import keep_for

    for name in ("max_tokens", "max_completion_tokens"):
        most = getattr(request, name)
        if most is not None and most > options.max_tokens:
            message = f"{name} is {most}, and this server gives at most {options.max_tokens}. Ask for fewer."
            raise Refusal(400, "invalid_value", message, name)
    images = len(image_urls(request))
    if images > options.max_images:
        message = f"The request has {images} pictures, and the most are {options.max_images}. Send fewer."
        raise Refusal(400, "too_many_images", message, "messages")
    _check_stops(request, pipeline)
    _check_schema(request)
    pruning, manifest = request.visprune, pipeline.manifest
    if pruning is None:
        return
    name = "ratio" if pruning.keep_tokens is None else "keep_tokens"
    try:
        keep_for(manifest, ratio=pruning.ratio, keep_tokens=pruning.keep_tokens)
        if pruning.overlay and manifest.pruning.grid is None:
            name = "overlay"
            raise UnsupportedError(
                "The visual tokens of this model are not a grid of patches.", "Leave visprune.overlay out."
            )
    except VispruneError as error:
        raise refusal_of(error, f"visprune.{name}") from None


def read_images(request: ChatRequest, reader: PictureReader) -> list[bytes]:
    """Return the files of a request's pictures. It may wait for the hosts of some.

    Raises:
        Refusal: 400, with the field that is at fault.
    """
    files = []
    for param, url in image_urls(request):
        try:
            files.append(reader.read(url))
        except VispruneError as error:
            raise Refusal(400, "invalid_image", str(error), param) from None
    return files


def make_turn(
    request: ChatRequest,
    pipeline: Pipeline,
    files: Sequence[bytes],
    reader: PictureReader,
    most_tokens: int,
) -> Turn:
    """Decode the pictures, and prepare the turn. No graph runs.

    Args:
        request: The request.
        pipeline: The model.
        files: Files of its pictures, in order.
        reader: Decodes them.
        most_tokens: The most tokens of the answer, if the request does not say.

    Raises:
        Refusal: 400, the conversation cannot be answered; 500, the model's own files fail.
    """
    from visprune.runtime import Message

    pruning = request.visprune
    try:
        messages = [
            Message("system" if message.role == "developer" else message.role, parts)
            for message, parts in zip(request.messages, _parts(request, files, reader), strict=True)
        ]
        return pipeline.prepare(
            messages,
            ratio=pruning.ratio if pruning else None,
            keep_tokens=pruning.keep_tokens if pruning else None,
            max_new_tokens=request.max_completion_tokens or request.max_tokens or most_tokens,
            sampling=_sampling(request),
            stop=_stops(request),
            schema=_schema(request),
            reuse_prefix=pruning is None or pruning.reuse_prefix is not False,
        )
    except VispruneError as error:
        # All other fields were checked before. What is left is the conversation, or its schema.
        param = "response_format" if request.response_format else None
        raise refusal_of(error, "messages" if isinstance(error, InputError) else param) from None


def _parts(
    request: ChatRequest, files: Sequence[bytes], reader: PictureReader
) -> Iterator[list[str | Image.Image]]:
    """Yield the texts and decoded pictures of each message.

    Raises:
        Refusal: 400, a picture cannot be decoded.
    """
    images, places = reader.decode(files), iter([param for param, _ in image_urls(request)])
    for message in request.messages:
        parts: list[str | Image.Image] = []
        for part in [message.content] if isinstance(message.content, str) else message.content:
            if isinstance(part, ImagePart):
                param = next(places)
                try:
                    parts.append(next(images))
                except VispruneError as error:
                    raise Refusal(400, "invalid_image", str(error), param) from None
            else:
                parts.append(part if isinstance(part, str) else part.text)
        yield parts


def _stops(request: ChatRequest) -> list[str]:
    return [request.stop] if isinstance(request.stop, str) else request.stop or []


def _check_stops(request: ChatRequest, pipeline: Pipeline) -> None:
    from visprune.runtime.generation import GenerationLimits
    from visprune.runtime.prompts import check_stops

    try:
        limits = GenerationLimits(1, tuple(_stops(request)))
        check_stops(limits.stop, pipeline.loaded.tokenizer)
    except VispruneError as error:
        raise refusal_of(error, "stop") from None


def _sampling(request: ChatRequest) -> Sampling:
    """Return how tokens are chosen. Fields that have no effect at temperature 0 are left out there."""
    from visprune.runtime import Sampling

    penalty = request.repetition_penalty or 1.0
    if not request.temperature:
        return Sampling(repetition_penalty=penalty)
    return Sampling(request.temperature, request.top_k or 0, request.top_p or 1.0, penalty, request.seed)


def _schema(request: ChatRequest) -> JsonSchema | None:
    from visprune.runtime.structured import ANY_OBJECT

    form = request.response_format
    if form is None or isinstance(form, TextFormat):
        return None
    return form.json_schema.schema_ if isinstance(form, SchemaFormat) else ANY_OBJECT


def _check_schema(request: ChatRequest) -> None:
    from visprune.runtime.structured import check_schema

    schema = _schema(request)
    try:
        if schema is not None:
            check_schema(schema)
    except MissingExtraError as error:
        raise Refusal(400, "unsupported_parameter", str(error), "response_format") from None
    except VispruneError as error:
        raise refusal_of(error, "response_format") from None
