"""Answers and descriptions of models in the forms of `answer_forms`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from visprune.serve.answer_forms import (
    AnswerMessage,
    Cached,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Figures,
    ModelCard,
    ModelFigures,
    PromptDetails,
    Usage,
)

if TYPE_CHECKING:
    from visprune.manifest import Manifest
    from visprune.runtime import Generation

__all__ = ["Answer", "as_json", "card", "figures"]


def card(name: str, manifest: Manifest, created: int, *, needs_auth: bool) -> ModelCard:
    """Return the description of a model.

    Args:
        name: Name under which it is served.
        manifest: Manifest of its bundle.
        created: Time at which the bundle was written, in seconds since 1970.
        needs_auth: Whether clients must send a key.
    """
    pruning, inside, decoder = manifest.pruning, manifest.layer_pruning, manifest.decoder
    total = pruning.budget.visual_tokens
    keep_tokens = pruning.keep_tokens
    if inside is not None and not pruning.budget.prunable:  # a ratio is then that of the method inside
        keep_tokens = inside.budget.kept(total)[-1]
    precision = manifest.quantization.parts["decoder"] if manifest.quantization else "float"
    return ModelCard(
        id=name,
        created=created,
        visprune=ModelFigures(
            method=pruning.method,
            inside_llm=inside.method if inside else None,
            visual_tokens=total,
            keep_tokens=keep_tokens,
            ratio=round(keep_tokens / total, 6),
            unit=pruning.budget.unit,
            context_length=decoder.context_length,
            precision=manifest.dtype if precision == "float" else precision,
            needs_auth=needs_auth,
        ),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What all parts of one answer share.

    Attributes:
        id: Name of the answer.
        model: Name of the model.
        created: Time of the answer, in seconds since 1970.
    """

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, result: Generation, figures: Figures) -> ChatCompletion:
        """Return the whole answer."""
        choice = Choice(message=AnswerMessage(content=result.text), finish_reason=_finish(result))
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=usage(result),
            visprune=figures,
        )

    def begin(self) -> ChatCompletionChunk:
        """Return the first piece, which has no text."""
        return self._chunk([ChunkChoice(delta=Delta(role="assistant", content=""))])

    def piece(self, text: str) -> ChatCompletionChunk:
        """Return a piece of text."""
        return self._chunk([ChunkChoice(delta=Delta(content=text))])

    def end(self, result: Generation, figures: Figures) -> ChatCompletionChunk:
        """Return the piece that says how the answer ended."""
        return self._chunk([ChunkChoice(delta=Delta(), finish_reason=_finish(result))], figures=figures)

    def count(self, result: Generation) -> ChatCompletionChunk:
        """Return the piece that has only the usage."""
        return self._chunk([], usage=usage(result))

    def _chunk(
        self, choices: list[ChunkChoice], usage: Usage | None = None, figures: Figures | None = None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage, visprune=figures
        )


def usage(result: Generation) -> Usage:
    """Return the numbers of tokens of an answer."""
    made = len(result.token_ids)
    return Usage(
        prompt_tokens=result.tokens_in,
        completion_tokens=made,
        total_tokens=result.tokens_in + made,
        prompt_tokens_details=PromptDetails(cached_tokens=result.tokens_cached),
    )


def figures(result: Generation, keep_tokens: int, queue_ms: float, overlays: list[str] | None) -> Figures:
    """Return the figures of an answer."""
    return Figures(
        visual_tokens=result.visual_tokens,
        tokens_kept=result.tokens_kept,
        keep_tokens=keep_tokens,
        keep_indices=[list(kept) for kept in result.keep_indices],
        merged_indices=[list(merged) for merged in result.merged_indices],
        layer_tokens=list(result.layer_tokens),
        timings_ms={name: round(ms, 3) for name, ms in result.timings_ms.items()},
        queue_ms=round(queue_ms, 3),
        cached=Cached(tokens=result.tokens_cached, images=result.images_cached),
        overlays=overlays,
    )


def as_json(form: ChatCompletion | ChatCompletionChunk) -> dict[str, Any]:
    """Return the JSON object of an answer or a piece, without the fields that OpenAI's leaves out."""
    found = form.model_dump()
    deltas = [choice["delta"] for choice in found["choices"] if "delta" in choice]
    for part in (found, found.get("visprune") or {}, *deltas):
        for name in [name for name, value in part.items() if value is None]:
            del part[name]
    return found


def _finish(result: Generation) -> Literal["stop", "length"]:
    return "length" if result.finish_reason == "length" else "stop"
