"""The public face of the runtime: a loaded bundle that answers questions about pictures."""

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
from visprune.runtime.reading import read_pictures, read_template, read_tokenizer
from visprune.runtime.sampling import Sampling
from visprune.runtime.session import cache_capacities, session_values
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.kept_tokens import keep_for
from visprune.runtime.vision.overlay import overlay, overlay_tiled
from visprune.verified import verify as verify_files

if TYPE_CHECKING:
    from PIL import Image

    from visprune.runtime.vision.sources import ImageSource, VisualInput

__all__ = ["Pipeline", "check_threads", "load", "threads_for"]

_GREEDY = Sampling()
_MAX_THREADS = 1024  # far past any machine this is for; ONNX Runtime starts every thread it is told to


def load(
    path: str | Path,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    low_memory: bool = False,
    verify: bool = True,
    on_file: Callable[[str, int], None] | None = None,
) -> Pipeline:
    """Load a bundle to run it.

    Args:
        path: Its directory.
        provider: What runs the graphs: "cpu" or "cuda"; "tensorrt" or "tensorrt-rtx" where the bundle has
            engines.
        threads: Processor threads, 1 to 1024; by default as many as this process may use.
        low_memory: Less memory, and more time. On the CPU weights stay in their files as they are, and each
            is widened as it is used. Engines are loaded when they are used, and leave the GPU where others
            need its memory.
        verify: Compare every file with its hash. Files that were good before and have not changed since
            are not read again.
        on_file: Called with name and size of each file that is about to be hashed, for a progress display.

    Raises:
        BundleError: The bundle is incomplete, altered, newer, or asks for what this runtime does not supply.
        UsageError: No such provider, or what it cannot do; a number of threads that cannot be.
        UnsupportedError: The provider cannot be had in this version or on this machine, or the bundle has no
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
        stack.pop_all()  # all is well: the pipeline closes them
    return pipeline


def threads_for(provider: str, threads: int) -> int | None:
    """What `load` is to be given of a number that stands for any provider: engines take none."""
    return None if provider in ENGINES else threads


def check_threads(threads: int) -> None:
    """Refuse a number of threads that cannot be.

    Raises:
        UsageError: It cannot.
    """
    if not 1 <= threads <= _MAX_THREADS:
        raise UsageError(
            f"Cannot run on {threads} threads.", f"Give a number from 1 to {_MAX_THREADS}, or leave it out."
        )


class Pipeline:
    """A bundle with its graphs loaded. Make it with `load`; close it, or use it in a `with`.

    Calls must not overlap. Several chats may be open at a time, each with its own cache.

    Args:
        bundle: The bundle.
        runners: One for each graph that a stage names.
        options: What they were opened with.

    Attributes:
        loaded: Its parts, which all of its chats share.

    Raises:
        BundleError: The program reads or lacks a value that the runtime supplies or needs.
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
        missing = set(session_values(manifest)) - executor.outputs - {"keep_indices"}
        if unknown or missing:
            what = f"needs {min(unknown)!r}" if unknown else f"does not give {min(missing)!r}"
            raise BundleError(f"The bundle's program {what}, unlike any this visprune runs.", "Export again.")
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
        """What the bundle says of itself."""
        return self.bundle.manifest

    def generate(
        self,
        images: VisualInput | Sequence[VisualInput] | None,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = _GREEDY,
        stop: Sequence[str] = (),
        system: str | None = None,
        ratio: float | None = None,
        keep_tokens: int | None = None,
    ) -> Generation:
        """Answer one prompt; see `stream`."""
        chat = self.chat(system=system, ratio=ratio, keep_tokens=keep_tokens)
        return chat.generate(prompt, images, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)

    def stream(
        self,
        images: VisualInput | Sequence[VisualInput] | None,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = _GREEDY,
        stop: Sequence[str] = (),
        system: str | None = None,
        ratio: float | None = None,
        keep_tokens: int | None = None,
    ) -> Stream:
        """Answer one prompt, the text as it comes; `.result` of what this returns has the figures.

        Args:
            images: One picture, several in order (a list or tuple), or None. A picture is a path, a `data:`
                URL, the bytes of a file, a binary file object, a Pillow image, or a NumPy array of uint8:
                [H, W, 3] in RGB, or [H, W]. A `Video` holds such frames, where the model takes videos;
                videos come after the pictures.
            prompt: The question; pictures stand before it.
            max_new_tokens: Most tokens generated.
            sampling: How tokens are chosen; greedy by default.
            stop: Texts that end the answer and are not part of it; that of a special token ends it at this
                token.
            system: A system prompt, with which the conversation begins.
            ratio: Fraction of visual tokens to keep, in (0, 1], by the bundle's method before the LLM, or the
                one inside it where there is no other.
            keep_tokens: The same as a count of one image. Without either, what the bundle was exported for.

        Raises:
            UsageError: Both ratio and keep_tokens, a count or a limit that cannot be, a stop that can never
                match.
            InputError: A prompt or a system prompt that is empty, not valid Unicode, contains the image token
                or is longer than the model's context; pictures or a system prompt that the model's chat
                template cannot show; a picture that cannot be read.
        """
        chat = self.chat(system=system, ratio=ratio, keep_tokens=keep_tokens)
        return chat.stream(prompt, images, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)

    def chat(
        self,
        *,
        system: str | None = None,
        ratio: float | None = None,
        keep_tokens: int | None = None,
    ) -> Chat:
        """Begin a conversation, whose turns share a cache.

        Args:
            system: A system prompt, with which it begins.
            ratio: As in `stream`.
            keep_tokens: As in `stream`.

        Raises:
            UsageError: Both ratio and keep_tokens, or a number that cannot be reached.
            InputError: A system prompt that cannot be used, or that the model's chat template cannot show.
        """
        return Chat(self.loaded, keep_for(self.manifest, ratio=ratio, keep_tokens=keep_tokens), system)

    def overlay(self, image: ImageSource, keep_indices: Sequence[int], *, images: int = 1) -> Image.Image:
        """The picture as the model saw it, with dropped patches dimmed.

        Args:
            image: The picture.
            keep_indices: Of this picture, from a `Generation`.
            images: Number of pictures in its prompt; some models show one alone in another way.

        Raises:
            UnsupportedError: The visual tokens of this model are not a grid of patches.
        """
        pruning, pictures = self.manifest.pruning, self.loaded.pictures
        if pictures.tiling is not None:
            kept, tiled = np.array(keep_indices, dtype=np.int64), pictures.tiles(images)
            return overlay_tiled(decode(image), pictures.tiling, pictures.processor, kept, tiled=tiled)
        if pruning.grid is None:
            raise UnsupportedError(
                "The visual tokens of this model are not a grid of patches.", "Leave the overlay out."
            )
        patches = np.array(keep_indices, dtype=np.int64) + pruning.grid_offset
        return overlay(pictures.processor.crop(decode(image)), patches, pruning.grid)

    def close(self) -> None:
        """Free the graphs. Nothing can be generated after that."""
        for runner in self._runners.values():
            runner.__exit__(None, None, None)
        self._runners.clear()  # the executor's too

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
