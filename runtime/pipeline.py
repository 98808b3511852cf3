"""The entry of the runtime: `load` a bundle into a `Pipeline`, which answers questions about images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from visprune.bundle import Bundle
from visprune.cache_names import past_names
from visprune.cores import usable_cores
from visprune.errors import BundleError, UnsupportedError, UsageError
from visprune.manifest import SUPPLIED, Manifest
from visprune.runtime.backends import ENGINES, backend, check_low_memory, graph_opener
from visprune.runtime.backends.runner import BackendOptions, Runner
from visprune.runtime.conversation import Chat, LoadedModel
from visprune.runtime.executor import Executor
from visprune.runtime.generation import Generation, Stream
from visprune.runtime.interfaces import check_interfaces
from visprune.runtime.options import ChatOptions, PromptOptions, check_names, split_options
from visprune.runtime.reading import read_pictures, read_template, read_tokenizer
from visprune.runtime.session import cache_capacities, session_values
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.kept_tokens import keep_for
from visprune.runtime.vision.overlay import overlay, overlay_tiled
from visprune.verified import verify as verify_files

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack

    from visprune.runtime.vision.sources import ImageSource, VisualInput

__all__ = ["Pipeline", "check_threads", "load", "threads_for"]

_MAX_THREADS = 1024  # more than any machine needs; ONNX Runtime starts as many threads as it is told to


def load(
    path: str | Path,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    low_memory: bool = False,
    verify: bool = True,
    on_file: Callable[[str, int], None] | None = None,
) -> Pipeline:
    """Load a bundle.

    Args:
        path: Directory of the bundle.
        provider: Backend that runs the graphs: "cpu", "cuda", "ort-tensorrt" or "ort-tensorrt-rtx";
            "tensorrt" or "tensorrt-rtx" for a bundle with engines.
        threads: Processor threads, 1 to 1024; by default as many as this process may use.
        low_memory: Use less memory and more time. On the CPU, weights stay in their files as they are, and
            each is converted to float32 when it is used. Engines are loaded when they are used, and unloaded
            when others need the GPU's memory.
        verify: Compare every file with its hash. A file that was verified before and has not changed since
            is not read again.
        on_file: Called with the name and the size (in bytes) of each file before it is hashed, to show
            progress.

    Raises:
        BundleError: The bundle is incomplete, altered or of a newer schema, or its program needs a value that
            this runtime does not supply.
        UsageError: The provider is unknown or does not take one of the options, or the number of threads is
            out of range.
        UnsupportedError: The provider cannot be used with this version or on this machine, the bundle has no
            engines for it, or there is too little memory.
        MissingExtraError: The provider's package is not installed.
    """
    bundle = Bundle.open(path)
    backend(provider)
    if threads is not None:
        check_threads(threads)
    if low_memory:
        check_low_memory(provider)
    if threads is not None and provider in ENGINES:
        raise UsageError(f"The provider {provider!r} computes on no processor threads.", "Leave them out.")
    check_interfaces(bundle.manifest)
    if verify:
        verify_files(bundle, on_file)
    options = BackendOptions(provider, threads or usable_cores(), low_memory)
    open_graph = graph_opener(bundle, options)
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_graph(name))
            for name in {stage.graph: None for stage in bundle.manifest.stages}
        }
        pipeline = Pipeline(bundle, runners, options)
        stack.pop_all()  # the pipeline closes the runners from here on
    return pipeline


def threads_for(provider: str, threads: int) -> int | None:
    """Return the `threads` to give to `load`: None for engines, which take no number of threads."""
    return None if provider in ENGINES else threads


def check_threads(threads: int) -> None:
    """Refuse a number of threads that is out of range.

    Raises:
        UsageError: The number is below 1 or above 1024.
    """
    if not 1 <= threads <= _MAX_THREADS:
        raise UsageError(
            f"Cannot run on {threads} threads.", f"Give a number from 1 to {_MAX_THREADS}, or leave it out."
        )


class Pipeline:
    """A bundle with its graphs loaded. Make it with `load`; close it, or use it in a `with` statement.

    Calls must not overlap in time. Several chats may be open at once, each with its own cache.

    Args:
        bundle: The bundle.
        runners: One runner for each graph that a stage names.
        options: Options that the runners were opened with.

    Attributes:
        loaded: Parts of the loaded bundle, shared by all of its chats.

    Raises:
        BundleError: The program reads a value that the runtime does not supply, or does not compute one that
            the runtime needs.
    """

    def __init__(self, bundle: Bundle, runners: dict[str, Runner], options: BackendOptions) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.options = options
        self._runners = runners
        executor = Executor(manifest.stages, manifest.graphs, runners, session_values(manifest))
        inside = manifest.layer_pruning
        supplied = {*SUPPLIED, *past_names(manifest.decoder), *(inside.supplied() if inside else ())}
        unknown = set(executor.inputs) - supplied
        missing = set(session_values(manifest)) - executor.outputs - {"keep_indices", "merge_weights"}
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
            cache_capacities(manifest, runners),
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
        pruning, pictures = self.manifest.pruning, self.loaded.pictures
        kept, merged = (np.array(found, dtype=np.int64) for found in (keep_indices, merged_indices))
        grid, offset = pruning.grid, pruning.grid_offset
        if pruning.resizes:
            count = keep_tokens or pictures.resized_tokens(pruning, decode(image), len(kept), images)
            pictures, side = pictures.for_tokens(pruning, count), pruning.smaller_side(count)
            grid = grid if side is None else (side, side)
        if pictures.arranged is not None:
            shown, tiled = decode(image), pictures.tiles(images)
            return overlay_tiled(shown, pictures.arranged, pictures.processor, kept, merged, tiled=tiled)
        if grid is None:
            raise UnsupportedError(
                "The visual tokens of this model are not a grid of patches.", "Leave the overlay out."
            )
        seen = pictures.seen(pictures.processor.crop(decode(image)))
        return overlay(seen, kept[kept >= 0] + offset, grid, merged + offset)

    def close(self) -> None:
        """Free the graphs. Nothing can be generated afterwards."""
        for runner in self._runners.values():
            runner.__exit__(None, None, None)
        self._runners.clear()  # the executor uses the same dictionary

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
