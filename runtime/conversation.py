"""A conversation: messages and pictures in, answers out, on one cache.

Every turn renders the whole conversation and hands all of its tokens to the session, which feeds what
the cache does not hold. So a turn gives what a fresh start with the same messages would give; except that
a method inside the LLM chose the tokens of earlier pictures by the prompt of their own turn.
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
from visprune.runtime.prompts import (
    check_prompt,
    check_stops,
    check_system,
    prompt_ids,
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
    from visprune.runtime.vision.sources import VisualInput

__all__ = ["Chat", "LoadedModel"]

_GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The loaded parts of a bundle, shared by all conversations with it."""

    manifest: Manifest
    executor: Executor
    tokenizer: Tokenizer
    template: ChatTemplate
    pictures: PictureMaker
    cache_capacities: tuple[float, ...] = ()
    """As `session.cache_capacities` gives it."""


class Chat:
    """One conversation. Make it with `Pipeline.chat`.

    Args:
        model: What answers.
        keep: What is kept of every image; fixed, as cached images keep theirs.
        system: The system prompt, with which the conversation begins, or None.

    Raises:
        InputError: A system prompt that `check_system` refuses.
    """

    def __init__(self, model: LoadedModel, keep: Keep, system: str | None = None) -> None:
        check_system(system, model.manifest.text, model.template)
        self._model = model
        self._session = Session(model.executor, model.manifest, keep, model.cache_capacities)
        self._begins = [] if system is None else [Message("system", system)]
        self._messages: list[Message] = []
        self._pictures: list[Picture] = []
        self._open: Stream | None = None
        self.keep = keep

    @property
    def messages(self) -> tuple[Message, ...]:
        """The finished turns; the system prompt is none."""
        return tuple(self._messages)

    @property
    def cached_tokens(self) -> int:
        """Tokens that the next turn need not compute again, as far as they are part of it."""
        return self._session.length

    def reset(self) -> None:
        """Forget the conversation, all but its system prompt."""
        self._end_open_turn()
        self._messages, self._pictures = [], []
        self._session.clear()

    def generate(
        self,
        prompt: str,
        images: VisualInput | Sequence[VisualInput] | None = (),
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = _GREEDY,
        stop: Sequence[str] = (),
    ) -> Generation:
        """One turn; see `stream`."""
        return self.stream(prompt, images, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop).result

    def stream(
        self,
        prompt: str,
        images: VisualInput | Sequence[VisualInput] | None = (),
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = _GREEDY,
        stop: Sequence[str] = (),
    ) -> Stream:
        """One turn, its answer as it comes.

        Everything about the input is checked before this returns. The turn becomes part of the
        conversation when the stream has ended; a new turn ends an unfinished one, which is then dropped.

        Args:
            prompt: What the user says.
            images: New pictures, shown before the text of this turn, and videos, which follow them.
            max_new_tokens: Most tokens generated.
            sampling: How tokens are chosen; greedy by default.
            stop: Texts that end the answer; that of a special token ends it at this token.

        Raises:
            InputError: A prompt that `check_prompt` refuses, a picture that cannot be read, a conversation
                that `prompt_ids` refuses or that is longer than the model's context.
            UsageError: A limit that means nothing, a stop that can never match.
        """
        start = time.perf_counter()
        limits = GenerationLimits(max_new_tokens, as_stops(stop))
        check_stops(limits.stop, self._model.tokenizer)
        self._end_open_turn()
        check_prompt(prompt, self._model.manifest)
        images = as_list(images)
        shown = [decode(image) for image in images if not isinstance(image, Video)]
        videos = [[decode(frame) for frame in item.frames] for item in images if isinstance(item, Video)]
        question = Message("user", prompt, images=len(shown), videos=len(videos))
        pictures = self._model.pictures.add(self._pictures, shown, videos)
        ids = self._tokens([*self._messages, question], pictures)
        self._session.check(ids, pictures)
        preprocess = (time.perf_counter() - start) * 1e3
        self._open = Stream(self._turn(question, ids, pictures, limits, Sampler(sampling), preprocess))
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
        manifest, session = self._model.manifest, self._session
        text = TextStream(self._model.tokenizer, limits.stop)
        pieces: list[str] = []
        history = list(ids)

        # Only what happens here is timed: between two pieces the time is the caller's.
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
            layer_tokens=prefill.layer_tokens,
            finish_reason=reason,
            timings_ms=timings,
        )

    def _tokens(self, messages: Sequence[Message], pictures: Sequence[Picture]) -> list[int]:
        model, manifest = self._model, self._model.manifest
        told = [*self._begins, *messages]
        ids = prompt_ids(told, model.template, model.tokenizer, manifest.text, manifest.decoder.vocab_size)
        return model.tokenizer.expand_images(ids, [self._session.image_length(p) for p in pictures])

    def _end_open_turn(self) -> None:
        if self._open:
            self._open.close()
            self._open = None


def _by_phase(timings: dict[str, float], manifest: Manifest) -> dict[str, float]:
    """The graphs that extend the cache are `prefill`, with their names where there are several."""
    cached = set(present_names(manifest.decoder))
    decoders = [s.graph for s in manifest.stages if cached & set(s.outputs.values())]
    names = {graph: "prefill" if len(decoders) == 1 else f"prefill.{graph}" for graph in decoders}
    return {names.get(graph, graph): ms for graph, ms in timings.items()}
