"""The turns of a conversation: `prepare` makes one from messages, and `respond` computes its answer.

A turn is prepared without the model, in any thread. Computing goes step by step, a token a step, so that
several conversations can take turns.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from visprune.cache_names import present_names
from visprune.errors import InputError, UsageError
from visprune.manifest import Manifest
from visprune.runtime.generation import FinishReason, Generation, GenerationLimits, as_stops
from visprune.runtime.loaded_model import LoadedModel
from visprune.runtime.messages import Message
from visprune.runtime.options import AnswerOptions
from visprune.runtime.prompts import (
    check_message,
    check_stops,
    check_system,
    prompt_ids,
    question_ids,
    without_placeholders,
)
from visprune.runtime.sampling import Sampler, Sampling
from visprune.runtime.session import Session
from visprune.runtime.structured import Grammar, compile_schema
from visprune.runtime.text import TextStream
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.pictures import Picture

__all__ = ["Turn", "prepare", "respond"]

_MAX_NEW_TOKENS = 128  # of an answer, by default


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation whose next answer can be computed. Make it with `Pipeline.prepare`.

    Attributes:
        messages: The messages, with pictures in the form of the vision tower.
        ids: Token ids of the whole prompt, with as many placeholders as each picture has tokens.
        pictures: All pictures, in order.
        keep: How many visual tokens are kept of each.
        limits: Limits at which the answer ends.
        sampling: How tokens are chosen.
        grammar: Grammar that the answer follows, or None.
        reuse_prefix: Whether the prefix cache may be used.
        preprocess_ms: Milliseconds that it took to prepare.
    """

    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]
    keep: Keep
    limits: GenerationLimits
    sampling: Sampling
    grammar: Grammar | None
    reuse_prefix: bool
    preprocess_ms: float

    @property
    def tokens_in(self) -> int:
        """Length of the whole prompt in tokens."""
        return len(self.ids)

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of the answer."""
        return self.limits.max_new_tokens

    @property
    def begun(self) -> str:
        """The begun answer that this one continues; "" if there is none."""
        last = self.messages[-1]
        return last.text if last.role == "assistant" else ""

    def answered(self, answer: str, manifest: Manifest) -> tuple[Message, ...]:
        """Return the messages with an answer after them, or with the begun one completed."""
        before = self.messages[:-1] if self.begun else self.messages
        return (*before, Message("assistant", without_placeholders(self.begun + answer, manifest.text)))


def prepare(
    model: LoadedModel,
    messages: Sequence[Message],
    keep: Keep,
    options: AnswerOptions,
    started: float | None = None,
    *,
    reuse_prefix: bool = True,
) -> Turn:
    """Check a conversation and turn it into token ids and pictures. No graph runs.

    Args:
        model: The model that is to answer.
        messages: The whole conversation, oldest first. If the last message is the assistant's, the answer
            continues it.
        keep: How many visual tokens are kept of every image.
        options: Options of the answer.
        started: Value of `time.perf_counter` when the preparation began; now, if left out.
        reuse_prefix: See `Turn`.

    Raises:
        InputError: `check_message`, `check_system`, `question_ids` or `prompt_ids` refuses the conversation,
            the last message is neither the user's nor the assistant's, or the conversation is longer than
            the model's context.
        UsageError: max_new_tokens is out of range, a stop can never match, the schema is none, or a begun
            answer has a schema.
        UnsupportedError: The schema cannot be followed.
        MissingExtraError: There is a schema, and llguidance is not installed.
    """
    start = time.perf_counter() if started is None else started
    manifest = model.manifest
    limits = GenerationLimits(
        options.get("max_new_tokens", _MAX_NEW_TOKENS), as_stops(options.get("stop", ()))
    )
    check_stops(limits.stop, model.tokenizer)
    messages = [_checked(message, model) for message in messages]
    if messages:
        _check_last(messages[-1])
    shown = [(message, visual) for message in messages for visual in message.visual]
    questions = [_question(message, model) for message, _ in shown]
    maker = model.pictures.for_tokens(manifest.pruning, keep.tokens)
    pictures = maker.make([visual for _, visual in shown], questions)
    session = model.session(keep)
    ids = prompt_ids(messages, model.template, model.tokenizer, manifest.text, manifest.decoder.vocab_size)
    ids = model.tokenizer.expand_images(ids, [session.image_length(picture) for picture in pictures])
    session.check(ids, pictures)
    left = iter(pictures)
    placed = tuple(message.with_pictures([next(left) for _ in message.visual]) for message in messages)
    if messages and messages[-1].role == "assistant" and options.get("schema") is not None:
        raise UsageError(
            "An answer that is begun cannot follow a JSON schema.", "Leave the beginning or the schema out."
        )
    schema, sampling = options.get("schema"), options.get("sampling", Sampling())
    grammar = None if schema is None else compile_schema(schema, model.tokenizer)
    spent = (time.perf_counter() - start) * 1e3
    return Turn(placed, tuple(ids), tuple(pictures), keep, limits, sampling, grammar, reuse_prefix, spent)


def respond(
    model: LoadedModel, session: Session, turn: Turn, *, all_images: bool
) -> Generator[str, None, Generation]:
    """Compute an answer. Yield the text that each token but the last makes final, and return the whole.

    Args:
        model: The model that answers.
        session: The session to compute with. Whatever it holds already of the prompt is not computed again.
        turn: The turn.
        all_images: Whether the figures are those of all images of the turn, or of those that are fed now.
    """
    manifest = model.manifest
    text = TextStream(model.tokenizer, turn.limits.stop, context=turn.begun)
    constraint = turn.grammar.constraint() if turn.grammar else None
    sampler = Sampler(turn.sampling, constraint)
    history, pieces = list(turn.ids), []
    last = len(turn.ids) + turn.limits.max_new_tokens
    # Only the model's work is timed. The time between two tokens is the caller's.
    start = time.perf_counter()
    prefill = session.prefill(turn.ids, turn.pictures)
    token = sampler(prefill.logits, history)
    prefill_ms, decode_ms = (time.perf_counter() - start) * 1e3, 0.0

    while True:
        history.append(token)
        ended = token in manifest.decoder.eos_token_ids
        pieces.append("" if ended else text.push(token))
        ended = ended or (constraint is not None and constraint.finished)
        if ended or text.stopped or len(history) == last or session.full:
            break
        yield pieces[-1]
        start = time.perf_counter()
        token = sampler(session.decode(token), history)
        decode_ms += (time.perf_counter() - start) * 1e3

    reason: FinishReason = "eos" if ended else "stop" if text.stopped else "length"
    pieces[-1] += text.finish()
    generated = len(history) - len(turn.ids)
    shown = prefill.of_all() if all_images else prefill
    timings = {
        "preprocess": turn.preprocess_ms,
        **_by_phase(prefill.timings_ms, manifest),
        "decode": decode_ms,
        "decode_per_token": decode_ms / max(1, generated - 1),
        "total": turn.preprocess_ms + prefill_ms + decode_ms,
    }
    return Generation(
        text="".join(pieces),
        token_ids=tuple(history[len(turn.ids) :]),
        tokens_in=len(turn.ids),
        tokens_kept=sum(map(len, shown.keep_indices)),
        visual_tokens=shown.visual_tokens,
        keep_indices=shown.keep_indices,
        merged_indices=shown.merged_indices,
        layer_tokens=shown.layer_tokens,
        finish_reason=reason,
        tokens_cached=prefill.tokens_cached,
        images_cached=len(shown.images) - len(prefill.images) + prefill.features_cached,
        timings_ms=timings,
    )


def _checked(message: Message, model: LoadedModel) -> Message:
    """Return a message without what no prompt can contain, or refuse it."""
    if not isinstance(message, Message):
        raise InputError(
            f"A message was given as {type(message).__name__}.", 'Give Message("user", "What is it?").'
        )
    text = model.manifest.text
    if message.role == "system":
        check_system(message.text, text, model.template)
    elif message.role == "assistant" and not message.visual:
        message = Message("assistant", without_placeholders(message.text, text))
    check_message(message, model.manifest)
    return message


def _check_last(message: Message) -> None:
    if message.role == "user" or (message.role == "assistant" and message.text):
        return
    kind = "an empty answer" if message.role == "assistant" else f"a message of the role {message.role!r}"
    raise InputError(
        f"The conversation ends with {kind}.", "End it with a question, or with the beginning of an answer."
    )


def _question(message: Message, model: LoadedModel) -> tuple[int, ...]:
    """Return the tokens of a question, if the method before the LLM chooses visual tokens by them."""
    pruning = model.manifest.pruning
    return question_ids(message.text, model.tokenizer, pruning.method) if pruning.needs_text else ()


def _by_phase(timings: dict[str, float], manifest: Manifest) -> dict[str, float]:
    """Rename graphs that extend the cache: one to `prefill`, several to `prefill.` and their names."""
    cached = set(present_names(manifest.decoder))
    decoders = [s.graph for s in manifest.stages if cached & set(s.outputs.values())]
    names = {graph: "prefill" if len(decoders) == 1 else f"prefill.{graph}" for graph in decoders}
    return {names.get(graph, graph): ms for graph, ms in timings.items()}
