"""A conversation: messages and images go in, answers come out, and all turns share one cache.

Every turn renders the whole conversation and passes all of its tokens to the session, which computes only
those that the cache does not hold. So a turn gives the same answer as a new conversation with the same
messages would. The one exception: a method inside the LLM chose the tokens of earlier images by the prompt
of their own turn.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from visprune.cache_names import present_names
from visprune.manifest import Manifest
from visprune.runtime.chat_template import ChatTemplate, Message
from visprune.runtime.executor import Executor
from visprune.runtime.generation import FinishReason, Generation, GenerationLimits, Stream, as_stops
from visprune.runtime.options import AnswerOptions, check_names
from visprune.runtime.prompts import (
    check_prompt,
    check_stops,
    check_system,
    prompt_ids,
    question_ids,
    without_placeholders,
)
from visprune.runtime.sampling import Sampler, Sampling
from visprune.runtime.session import Session
from visprune.runtime.text import TextStream, Tokenizer
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.pictures import Picture, PictureMaker
from visprune.runtime.vision.sources import Video, as_list

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from visprune.runtime.vision.sources import VisualInput

__all__ = ["Chat", "LoadedModel"]

_MAX_NEW_TOKENS = 128  # of an answer, by default


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The loaded parts of a bundle, shared by all conversations with it."""

    manifest: Manifest
    executor: Executor
    tokenizer: Tokenizer
    template: ChatTemplate
    pictures: PictureMaker
    cache_capacities: tuple[float, ...] = ()
    """Most tokens in the caches of each group of layers, from the function `session.cache_capacities`."""


class Chat:
    """One conversation. Make it with `Pipeline.chat`.

    Args:
        model: The model that answers.
        keep: How many visual tokens are kept of every image. It is fixed, because tokens of cached images
            cannot be chosen again.
        system: System prompt, which begins the conversation, or None.

    Raises:
        InputError: `check_system` refuses the system prompt.
    """

    def __init__(self, model: LoadedModel, keep: Keep, system: str | None = None) -> None:
        check_system(system, model.manifest.text, model.template)
        self._model = model
        self._session = Session(model.executor, model.manifest, keep, model.cache_capacities)
        self._system = [] if system is None else [Message("system", system)]
        self._messages: list[Message] = []
        self._pictures: list[Picture] = []
        self._open: Stream | None = None
        self._maker = model.pictures.for_tokens(model.manifest.pruning, keep.tokens)
        self.keep = keep

    @property
    def messages(self) -> tuple[Message, ...]:
        """Messages of the finished turns, without the system prompt."""
        return tuple(self._messages)

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the cache. The next turn reuses those that its prompt begins with."""
        return self._session.length

    def reset(self) -> None:
        """Forget the conversation except its system prompt."""
        self._end_open_turn()
        self._messages, self._pictures = [], []
        self._session.clear()

    def generate(
        self,
        prompt: str,
        images: VisualInput | Sequence[VisualInput] | None = (),
        **options: Unpack[AnswerOptions],
    ) -> Generation:
        """Answer one turn. Arguments and errors are those of `stream`."""
        return self.stream(prompt, images, **options).result

    def stream(
        self,
        prompt: str,
        images: VisualInput | Sequence[VisualInput] | None = (),
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """Answer one turn piece by piece.

        The whole input is checked before this returns. The turn becomes part of the conversation when the
        stream has ended. A new turn ends an unfinished one, which is then dropped.

        Args:
            prompt: The user's message.
            images: New images, which are put before the text of this turn; videos come after the images.
            **options: `max_new_tokens`, `sampling` and `stop`, as in `Pipeline.stream`.

        Raises:
            TypeError: An option is unknown.
            InputError: `check_prompt` or `question_ids` refuses the prompt, `prompt_ids` refuses the
                conversation, an image cannot be read, or the conversation is longer than the model's context.
            UsageError: max_new_tokens is out of range, or a stop can never match.
        """
        start = time.perf_counter()
        check_names("Chat.stream", options, AnswerOptions.__optional_keys__)
        limits = GenerationLimits(
            options.get("max_new_tokens", _MAX_NEW_TOKENS), as_stops(options.get("stop", ()))
        )
        sampler = Sampler(options.get("sampling", Sampling()))
        check_stops(limits.stop, self._model.tokenizer)
        self._end_open_turn()
        check_prompt(prompt, self._model.manifest)
        images = as_list(images)
        shown = [decode(image) for image in images if not isinstance(image, Video)]
        videos = [[decode(frame) for frame in item.frames] for item in images if isinstance(item, Video)]
        question = Message("user", prompt, images=len(shown), videos=len(videos))
        pictures = self._maker.add(self._pictures, shown, videos, self._question_ids(prompt))
        ids = self._tokens([*self._messages, question], pictures)
        self._session.check(ids, pictures)
        preprocess = (time.perf_counter() - start) * 1e3
        self._open = Stream(self._turn(question, ids, pictures, limits, sampler, preprocess))
        return self._open

    def _turn(
        self,
        question: Message,
        ids: list[int],
        pictures: list[Picture],
        limits: GenerationLimits,
        sampler: Sampler,
        preprocess_ms: float,
    ) -> Generator[str, None, Generation]:
        """Generate one answer: yield its text, add the turn to the conversation, and return the figures."""
        manifest, session = self._model.manifest, self._session
        text = TextStream(self._model.tokenizer, limits.stop)
        pieces: list[str] = []
        history = list(ids)

        # Only the model's work is timed. The time between two pieces is the caller's.
        start = time.perf_counter()
        prefill = session.prefill(ids, pictures)
        token = sampler(prefill.logits, history)
        prefill_ms, decode_ms = (time.perf_counter() - start) * 1e3, 0.0

        while True:
            history.append(token)
            generated = len(history) - len(ids)
            reason: FinishReason | None = None
            if token in manifest.decoder.eos_token_ids:
                reason = "eos"
            else:
                piece = text.push(token)
                if piece:
                    pieces.append(piece)
                    yield piece
                if text.stopped:
                    reason = "stop"
                elif generated == limits.max_new_tokens or session.full:
                    reason = "length"
            if reason:
                break
            start = time.perf_counter()
            token = sampler(session.decode(token), history)
            decode_ms += (time.perf_counter() - start) * 1e3

        if piece := text.finish():
            pieces.append(piece)
            yield piece
        answer = "".join(pieces)
        self._messages += [question, Message("assistant", without_placeholders(answer, manifest.text))]
        self._pictures = pictures
        timings = {
            "preprocess": preprocess_ms,
            **_by_phase(prefill.timings_ms, manifest),
            "decode": decode_ms,
        }
        timings["decode_per_token"] = decode_ms / max(1, generated - 1)
        timings["total"] = preprocess_ms + prefill_ms + decode_ms
        return Generation(
            text=answer,
            token_ids=tuple(history[len(ids) :]),
            tokens_in=len(ids),
            tokens_kept=sum(len(kept) for kept in prefill.keep_indices),
            visual_tokens=prefill.visual_tokens,
            keep_indices=prefill.keep_indices,
            merged_indices=prefill.merged_indices,
            layer_tokens=prefill.layer_tokens,
            finish_reason=reason,
            timings_ms=timings,
        )

    def _tokens(self, messages: Sequence[Message], pictures: Sequence[Picture]) -> list[int]:
        """Return the prompt's token ids, with as many placeholders as each image has tokens."""
        model, manifest = self._model, self._model.manifest
        conversation = [*self._system, *messages]
        ids = prompt_ids(
            conversation, model.template, model.tokenizer, manifest.text, manifest.decoder.vocab_size
        )
        return model.tokenizer.expand_images(ids, [self._session.image_length(p) for p in pictures])

    def _question_ids(self, prompt: str) -> tuple[int, ...]:
        """Return the tokens of the question, if the method before the LLM chooses visual tokens by them."""
        pruning = self._model.manifest.pruning
        return question_ids(prompt, self._model.tokenizer, pruning.method) if pruning.needs_text else ()

    def _end_open_turn(self) -> None:
        if self._open:
            self._open.close()
            self._open = None


def _by_phase(timings: dict[str, float], manifest: Manifest) -> dict[str, float]:
    """Rename graphs that extend the cache: one to `prefill`, several to `prefill.` and their names."""
    cached = set(present_names(manifest.decoder))
    decoders = [s.graph for s in manifest.stages if cached & set(s.outputs.values())]
    names = {graph: "prefill" if len(decoders) == 1 else f"prefill.{graph}" for graph in decoders}
    return {names.get(graph, graph): ms for graph, ms in timings.items()}
