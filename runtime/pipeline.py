"""A loaded bundle, which answers questions about images. `loading` makes it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from visprune.bundle import Bundle
from visprune.cache_names import past_names
from visprune.errors import BundleError
from visprune.manifest import SUPPLIED, Manifest
from visprune.runtime.backends import ENGINES
from visprune.runtime.backends.host_cache import capacity_for
from visprune.runtime.backends.runner import BackendOptions, Runner
from visprune.runtime.conversation import Chat
from visprune.runtime.executor import Executor
from visprune.runtime.generation import Generation, Stream
from visprune.runtime.loaded_model import Caches, LoadedModel
from visprune.runtime.messages import Message
from visprune.runtime.options import AnswerOptions, ChatOptions, PromptOptions, check_names, split_options
from visprune.runtime.reading import read_pictures, read_template, read_tokenizer
from visprune.runtime.session import cache_capacities, session_values
from visprune.runtime.turns import Turn, prepare, respond
from visprune.runtime.vision.kept_tokens import keep_for
from visprune.runtime.vision.overlay import draw_overlay

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack

    from visprune.runtime.vision.sources import ImageSource, VisualInput

__all__ = ["Pipeline"]


class Pipeline:
    """A bundle with its graphs loaded. Make it with `load`; close it, or use it in a `with` statement.

    Calls must not overlap in time. Several chats may be open at once, each with its own cache.

    Args:
        bundle: The bundle.
        runners: One runner for each graph that a stage names.
        options: Options that the runners were opened with.
        caches: What is kept from one request to the next; by default nothing.

    Attributes:
        loaded: Parts of the loaded bundle, shared by all of its chats.

    Raises:
        BundleError: The program reads a value that the runtime does not supply, or does not compute one that
            the runtime needs.
    """

    def __init__(
        self,
        bundle: Bundle,
        runners: dict[str, Runner],
        options: BackendOptions,
        caches: Caches | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.options = options
        self._runners = runners
        caches = caches or Caches()
        values = session_values(manifest)
        executor = Executor(manifest.stages, manifest.graphs, runners, values, caches.pictures)
        inside = manifest.layer_pruning
        supplied = {*SUPPLIED, *past_names(manifest.decoder), *(inside.supplied() if inside else ())}
        unknown = set(executor.inputs) - supplied
        missing = set(values) - executor.outputs - {"keep_indices", "merge_weights"}
        if unknown or missing:
            raise BundleError(
                f"The bundle's program needs {min(unknown)!r}, which this visprune does not supply."
                if unknown
                else f"The bundle's program does not give {min(missing)!r}, which this visprune needs.",
                "Export again with this visprune.",
            )
        self.loaded = LoadedModel(
            manifest,
            executor,
            read_tokenizer(bundle),
            read_template(bundle),
            read_pictures(bundle),
            cache_capacities(manifest, runners) if options.provider in ENGINES else (),
            caches,
        )

    @property
    def manifest(self) -> Manifest:
        """Manifest of the bundle."""
        return self.bundle.manifest

    def generate(
        self,
        images: VisualInput | Sequence[VisualInput] | None,
        prompt: str,
        **options: Unpack[PromptOptions],
    ) -> Generation:
        """Answer one prompt. Arguments and errors are those of `stream`."""
        return self.stream(images, prompt, **options).result

    def stream(
        self,
        images: VisualInput | Sequence[VisualInput] | None,
        prompt: str,
        **options: Unpack[PromptOptions],
    ) -> Stream:
        """Answer one prompt piece by piece. Iterate over the result for the text; `.result` has the figures.

        Args:
            images: One image, several in order (a list or tuple), or None. An image is a path, a `data:`
                URL, the bytes of a file, a binary file object, a Pillow image, or a NumPy array of uint8:
                [H, W, 3] in RGB, or [H, W]. A `Video` holds such frames, for a model that takes videos;
                videos come after the images.
            prompt: The question. Images are put before it.
            **options: All are optional:

                max_new_tokens (int): The most tokens to generate; 128 by default.
                sampling (Sampling): How tokens are chosen; greedy by default.
                stop (sequence of str): Texts that end the answer and are not part of it. The text of a
                    special token ends the answer at that token.
                schema (dict or bool): JSON Schema that the answer follows; see `visprune.runtime.structured`.
                system (str): System prompt, which begins the conversation; none by default.
                ratio (float): Fraction of the visual tokens to keep, in (0, 1], by the bundle's method before
                    the LLM; by the method inside the LLM if there is no other. By default the one that the
                    bundle was exported for.
                keep_tokens (int): The same as a number of tokens of one image. Give one of the two.

        Raises:
            TypeError: An option is unknown.
            UsageError: Both ratio and keep_tokens are given, a number is out of range, or a stop can never
                match.
            InputError: The prompt or the system prompt is empty, is not valid Unicode, contains the image
                token or is longer than the model's context; the model's chat template cannot show the
                images or the system prompt; or an image cannot be read.
        """
        check_names("Pipeline.stream", options, PromptOptions.__optional_keys__)
        of_chat, of_answer = split_options(options)
        return self.chat(**of_chat).stream(prompt, images, **of_answer)

    def chat(self, **options: Unpack[ChatOptions]) -> Chat:
        """Begin a conversation. Its turns share one cache.

        Args:
            **options: `system`, `ratio` and `keep_tokens`, as in `stream`.

        Raises:
            TypeError: An option is unknown.
            UsageError: Both ratio and keep_tokens are given, or the number cannot be reached.
            InputError: The system prompt cannot be used, or the model's chat template cannot show it.
        """
        check_names("Pipeline.chat", options, ChatOptions.__optional_keys__)
        keep = keep_for(self.manifest, ratio=options.get("ratio"), keep_tokens=options.get("keep_tokens"))
        return Chat(self.loaded, keep, options.get("system"))

    def prepare(
        self,
        messages: Sequence[Message],
        *,
        ratio: float | None = None,
        keep_tokens: int | None = None,
        reuse_prefix: bool = True,
        **options: Unpack[AnswerOptions],
    ) -> Turn:
        """Check a whole conversation and get its next answer ready, in any thread. No graph runs.

        Args:
            messages: The conversation, oldest first, system prompt included. If the last message is the
                assistant's, the answer continues it and holds only what is new.
            ratio: As in `stream`.
            keep_tokens: As in `stream`.
            reuse_prefix: Whether `answer` may use the prefix cache. Without it, the times are those of the
                whole prompt.
            **options: Those of an answer, as in `stream`.

        Raises:
            TypeError: An option is unknown.
            UsageError: As for `stream`.
            InputError: A message cannot be used, the model's chat template cannot show the conversation, or
                it is longer than the model's context.
        """
        check_names("Pipeline.prepare", options, AnswerOptions.__optional_keys__)
        keep = keep_for(self.manifest, ratio=ratio, keep_tokens=keep_tokens)
        return prepare(self.loaded, messages, keep, options, reuse_prefix=reuse_prefix)

    def answer(self, turn: Turn) -> Stream:
        """Answer a prepared turn, piece by piece or step by step (`Stream.step`).

        What an earlier answer of this method has computed of the same prompt is taken from the prefix cache.
        The figures are those of all images of the turn.

        Args:
            turn: From `prepare` of this pipeline.
        """
        return Stream(self._answer(turn))

    def _answer(self, turn: Turn) -> Generator[str, None, Generation]:
        prefixes = self.loaded.caches.prefixes
        session = self.loaded.session(turn.keep)
        if turn.reuse_prefix:
            session = prefixes.take(session, turn.ids, turn.pictures)
        try:
            answer = yield from respond(self.loaded, session, turn, all_images=True)
        except GeneratorExit:  # ended early: what was computed is as good as that of a whole answer
            prefixes.put(session)
            raise
        prefixes.put(session)
        return answer

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of the keys and values of a conversation of so many tokens, at most.

        They are fewer where tokens leave inside the LLM. Buffers that are written in place have room for more
        tokens, and those of engines have a fixed size.
        """
        decoder = self.manifest.decoder
        rooms = [int(room) for room in self.loaded.cache_capacities if room < inf]
        tokens = max(capacity_for(tokens), *rooms, 0)
        numbers = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
        return tokens * numbers * np.dtype(decoder.cache_dtype).itemsize

    @property
    def caches(self) -> Caches:
        """What is kept from one request to the next."""
        return self.loaded.caches

    def overlay(
        self,
        image: ImageSource,
        keep_indices: Sequence[int],
        *,
        images: int = 1,
        merged_indices: Sequence[int] = (),
        keep_tokens: int | None = None,
    ) -> Image.Image:
        """Draw an image as the model saw it, with dropped patches dimmed and merged ones tinted.

        Args:
            image: The image.
            keep_indices: Kept tokens of this image, from a `Generation`.
            images: Number of images in its prompt. Some models cut only a single image into tiles.
            merged_indices: Patches merged into the kept tokens, from the same `Generation`.
            keep_tokens: K of the request. It matters only where the image is made smaller and tokens leave
                inside the LLM too; otherwise it follows from the number of kept tokens.

        Raises:
            UnsupportedError: The visual tokens of this model are not a grid of patches.
        """
        return draw_overlay(
            self.manifest.pruning,
            self.loaded.pictures,
            image,
            keep_indices,
            images=images,
            merged_indices=merged_indices,
            keep_tokens=keep_tokens,
        )

    def close(self) -> None:
        """Free the graphs. Nothing can be generated afterwards."""
        for runner in self._runners.values():
            runner.__exit__(None, None, None)
        self._runners.clear()  # the executor uses the same dictionary
        self.caches.pictures.clear()
        self.caches.prefixes.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
