"""The request of a chat completion: every field that OpenAI's API has, and what of it is taken here.

A field that this server does not have is in the schema with the only values that change nothing, such as
`n: 1`. So clients that always send it can be used, and any other value is refused by the field's name.
`requests` has the rules between fields, and `request_errors` the refusals.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

__all__ = ["ChatMessage", "ChatRequest", "ImagePart", "SchemaFormat", "TextFormat", "TextPart"]

_Nothing: TypeAlias = Annotated[list[Any], Field(max_length=0)] | None
# The bound of 64 bits is checked, and is not described: readers of JSON in JavaScript would round it.
_Count: TypeAlias = Annotated[int, Field(ge=1, lt=2**63), WithJsonSchema({"type": "integer", "minimum": 1})]
_Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63), WithJsonSchema({"type": "integer", "minimum": 0})]
_One: TypeAlias = Annotated[int, Field(ge=1, le=1), WithJsonSchema({"const": 1})]
_NoCount: TypeAlias = Annotated[int, Field(ge=0, le=0), WithJsonSchema({"const": 0})]
_Zero: TypeAlias = Annotated[float, Field(ge=0, le=0), WithJsonSchema({"const": 0})] | None


class _Form(BaseModel):
    # JSON has types of its own, so nothing is converted: "1" is no number, and 1.0 no whole one.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Form):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Form):
    """Where a picture is."""

    url: str = Field(
        description="A data: URL in base64. An http(s) URL, if the server was started with --allow-url."
    )
    detail: Literal["auto"] | None = Field(
        None, description="Only auto: visprune.ratio says how much is kept."
    )


class ImagePart(_Form):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _tag(prefix: str, key: str) -> Discriminator:
    """Choose a form by a key. The tag has a colon, so that places in errors tell it from keys."""

    def choose(value: Any) -> str:
        name = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return f"{prefix}:{name}"

    return Discriminator(choose)


def _form(value: Any) -> str:
    return "form:parts" if isinstance(value, list) else "form:text"


_Part = Annotated[
    Annotated[TextPart, Tag("type:text")] | Annotated[ImagePart, Tag("type:image_url")], _tag("type", "type")
]
_Parts = Annotated[
    Annotated[str, Tag("form:text")] | Annotated[list[_Part], Field(min_length=1), Tag("form:parts")],
    Discriminator(_form),
]
_Texts = Annotated[
    Annotated[str, Tag("form:text")] | Annotated[list[TextPart], Field(min_length=1), Tag("form:parts")],
    Discriminator(_form),
]
_Stop = Annotated[
    Annotated[str, Tag("form:text")] | Annotated[list[str], Field(max_length=16), Tag("form:parts")],
    Discriminator(_form),
]


def _or_empty(value: Any) -> Any:
    """Return the content of an answer that has none, as clients send it back, as an empty text."""
    return "" if value is None else value


class SystemMessage(_Form):
    """An instruction. A developer's message is the same."""

    role: Literal["system", "developer"]
    content: _Texts
    name: None = None


class UserMessage(_Form):
    """What the user says, with pictures."""

    role: Literal["user"]
    content: _Parts
    name: None = None


class AssistantMessage(_Form):
    """An answer, or the beginning of one if it is the last message: the model continues it."""

    role: Literal["assistant"]
    content: Annotated[_Texts, BeforeValidator(_or_empty)] = Field(
        "", description="Null is taken as an empty text."
    )
    name: None = None
    # Clients send an answer back as they got it, with the fields that it does not have.
    refusal: None = None
    annotations: _Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: _Nothing = None


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("role:system")]
    | Annotated[SystemMessage, Tag("role:developer")]
    | Annotated[UserMessage, Tag("role:user")]
    | Annotated[AssistantMessage, Tag("role:assistant")],
    _tag("role", "role"),
]


class StreamOptions(_Form):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="Send the usage in a last chunk without choices.")
    include_obfuscation: Literal[False] | None = None


class NamedSchema(_Form):
    """A JSON Schema with a name."""

    name: str = Field(min_length=1, max_length=64)
    # The name `schema` is taken in pydantic's BaseModel.
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON Schema (draft 2020-12).")
    strict: bool | None = Field(None, description="The schema is always kept, whatever this says.")
    description: None = None


class TextFormat(_Form):
    """An answer in any form."""

    type: Literal["text"]


class ObjectFormat(_Form):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class SchemaFormat(_Form):
    """An answer in JSON that keeps a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


_Format = Annotated[
    Annotated[TextFormat, Tag("type:text")]
    | Annotated[ObjectFormat, Tag("type:json_object")]
    | Annotated[SchemaFormat, Tag("type:json_schema")],
    _tag("type", "type"),
]


class Pruning(_Form):
    """How many visual tokens of each picture are kept, and what else is wanted."""

    ratio: float | None = Field(None, gt=0, le=1, description="Fraction to keep; by default the bundle's.")
    keep_tokens: _Count | None = Field(None, description="The same as a number of tokens of one picture.")
    overlay: bool | None = Field(None, description="Send each picture with its dropped patches dimmed.")
    reuse_prefix: bool | None = Field(
        None,
        description="False computes the whole prompt, so that the times show what it costs. Features of "
        "pictures may still be cached. True by default.",
    )


class ChatRequest(_Form):
    """A chat completion, as OpenAI's API has it. Fields that nothing else is said of change nothing."""

    model: str = Field(description="A name that /v1/models lists.")
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = Field(None, description="The most tokens of the answer.")
    max_completion_tokens: _Count | None = Field(None, description="The same.")
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Has no effect at temperature 0.")
    top_k: int | None = Field(None, ge=0, description="0 is all. Has no effect at temperature 0.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Above 1, repeats are less probable."
    )
    seed: _Seed | None = Field(None, description="Has no effect at temperature 0.")
    stop: _Stop | None = Field(
        None, description="A text that ends the answer, or up to 16. They are no part of the answer."
    )
    response_format: _Format | None = None
    visprune: Pruning | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    n: _One | None = None
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: _NoCount | None = None
    presence_penalty: _Zero = None
    frequency_penalty: _Zero = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    tools: _Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: _Nothing = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    web_search_options: None = None
