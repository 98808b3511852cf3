"""Loading of a bundle: its checks, its graphs, and the options of the backend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from visprune.bundle import Bundle
from visprune.cores import usable_cores
from visprune.errors import UsageError
from visprune.runtime.backends import AT_ONCE, ENGINES, backend, check_low_memory, graph_opener
from visprune.runtime.backends.opening import begin_to_open
from visprune.runtime.backends.runner import BackendOptions, Runner
from visprune.runtime.bounded import BoundedCache
from visprune.runtime.interfaces import check_interfaces
from visprune.runtime.loaded_model import Caches
from visprune.runtime.pipeline import Pipeline
from visprune.runtime.prefixes import Prefixes
from visprune.verified import verify as verify_files

__all__ = ["check_threads", "load", "threads_for"]

_MAX_THREADS = 1024  # more than any machine needs; ONNX Runtime starts as many threads as it is told to


def load(  # noqa: PLR0913 - all are independent
    path: str | Path | Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    low_memory: bool = False,
    verify: bool = True,
    wait: bool = True,
    picture_cache: int = 0,
    prefix_cache: int = 0,
    on_file: Callable[[str, int], None] | None = None,
) -> Pipeline:
    """Load a bundle.

    Args:
        path: Directory of the bundle, or the bundle as it was opened.
        provider: Backend that runs the graphs: "cpu", "cuda", "ort-tensorrt" or "ort-tensorrt-rtx";
            "tensorrt" or "tensorrt-rtx" for a bundle with engines.
        threads: Processor threads, 1 to 1024; by default as many as this process may use.
        low_memory: Use less memory and more time. On the CPU, weights stay in their files as they are, and
            each is converted to float32 when it is used. Engines are loaded when they are used, and unloaded
            when others need the GPU's memory.
        verify: Compare every file with its hash. A file that was verified before and has not changed since
            is not read again.
        wait: Return when all graphs are open. Otherwise, on the CPU, a graph that is still being opened is
            waited for when it runs first, and an error of its file or for lack of memory is raised there.
        picture_cache: Bytes in which to keep the features of the last images, as they are before the pruner.
            A question about one of them, at any ratio, then needs no run of the vision encoder.
        prefix_cache: Bytes in which `Pipeline.answer` keeps the keys and values of the last conversations. A
            prompt that begins like one of them is computed from where it differs.
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
    bundle = path if isinstance(path, Bundle) else Bundle.open(path)
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
    graphs = {stage.graph: None for stage in bundle.manifest.stages}
    runners: dict[str, Runner]
    with ExitStack() as stack:
        if provider in AT_ONCE:
            openings = begin_to_open(open_graph, graphs, options.threads)
            for opening in openings.values():
                stack.enter_context(opening)
            runners = {name: one.wait() if wait else one for name, one in openings.items()}
        else:
            runners = {name: stack.enter_context(open_graph(name)) for name in graphs}
        caches = Caches(BoundedCache(picture_cache), Prefixes(prefix_cache))
        pipeline = Pipeline(bundle, runners, options, caches)
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
