"""The forms of what the server sends: OpenAI's, with an object `visprune`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "AnswerMessage",
    "Cached",
    "ChatCompletion",
    "ChatCompletionChunk",
    "Choice",
    "ChunkChoice",
    "Delta",
    "ErrorBody",
    "Figures",
    "ModelCard",
    "ModelFigures",
    "ModelList",
    "PromptDetails",
    "Usage",
]


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True)


class ModelFigures(_Form):
    """How a model prunes. `visual_tokens` and `keep_tokens` are of one picture, or of one tile of it."""

    method: str
    inside_llm: str | None
    visual_tokens: int
    keep_tokens: int
    ratio: float
    unit: Literal["token", "row", "square"]
    context_length: int
    precision: str
    needs_auth: bool


class ModelCard(_Form):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "visprune"
    visprune: ModelFigures


class ModelList(_Form):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class PromptDetails(_Form):
    """Tokens of the prompt that did not have to be computed."""

    cached_tokens: int


class Usage(_Form):
    """Numbers of tokens. Those of the prompt include the visual tokens that were kept."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Cached(_Form):
    """What was found in the caches: tokens of the prompt, and pictures whose features were known."""

    tokens: int
    images: int


class Figures(_Form):
    """What became of the pictures, and the milliseconds of each stage."""

    visual_tokens: int
    tokens_kept: int
    keep_tokens: int
    keep_indices: list[list[int]]
    merged_indices: list[list[int]]
    layer_tokens: list[int]
    timings_ms: dict[str, float]
    queue_ms: float
    cached: Cached
    overlays: list[str] | None = None


class AnswerMessage(_Form):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Form):
    """The only choice."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Form):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    visprune: Figures


class Delta(_Form):
    """What is new in a piece."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Form):
    """A piece of the only choice."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(_Form):
    """A piece of an answer that is streamed. The one with the finish_reason has the figures."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    visprune: Figures | None = None


class ErrorDetails(_Form):
    """What is wrong and what to do, and the field that is at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(_Form):
    """A request that is not answered."""

    error: ErrorDetails
