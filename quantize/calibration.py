"""Run a bundle on samples and keep what its linear layers see.

The whole pipeline runs, so the language model sees the visual tokens that pruning leaves, and a few decoded
ones. Weights stay mapped from their files. What is kept is cached, by the hashes of bundle and data.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visprune.bundle import Bundle
from visprune.caches import cache_dir, keep
from visprune.cores import usable_cores
from visprune.errors import BundleError, InputError
from visprune.progress import Progress
from visprune.quantize.loading import load_graph, serialize
from visprune.quantize.observe import Observation, Observer, Sink, add_observations
from visprune.records import sha256
from visprune.runtime.backends.ort import open_cpu, open_model
from visprune.runtime.backends.runner import BackendOptions, Runner
from visprune.runtime.generation import Generation
from visprune.runtime.pipeline import Pipeline
from visprune.runtime.samples import Sample
from visprune.version import __version__

__all__ = ["Statistics", "Watched", "ask", "calibrate", "calm", "observed", "observed_pipeline"]

Array = NDArray[np.float32]

Watched = Mapping[str, Mapping[str, int]]
"""For each graph the values to observe, and the width of each."""

NEW_TOKENS = 8
"""Decoded after each prompt, so that statistics are not only those of a prefill."""

_ROWS = 256
_FORMAT = 1  # of what is remembered
_PARTS = ("amax", "mean", "rows")


@dataclass(slots=True)
class Statistics:
    """What was seen of one activation over all samples.

    Attributes:
        amax: Largest magnitude of each channel, over every token, [K].
        mean: Mean magnitude of each channel, over every token, [K].
        rows: Some tokens, [R, K].
    """

    amax: Array
    mean: Array
    rows: Array


@dataclass(slots=True)
class _Tally:
    """Adds up what is seen of one value."""

    amax: Array
    total: NDArray[np.float64]
    count: int = 0
    rows: list[Array] = field(default_factory=list)


def calibrate(
    bundle: Bundle, samples: Sequence[Sample], watched: Watched, progress: Progress
) -> dict[str, Statistics]:
    """Statistics of values, by "graph/value".

    Args:
        bundle: The float bundle.
        samples: To run it on.
        watched: The values.
        progress: Called as the work goes on.

    Raises:
        BundleError: An activation is not finite.
        InputError: A prompt is too long, or contains the image token.
    """
    memory = cache_dir("calibration") / f"{_key(bundle, samples, watched)}.npz"
    known = _read(memory)
    if known is not None:
        progress("calibrating (remembered)", 1, 1)
        return known
    tallies: dict[str, _Tally] = {}
    at = samples[0]

    def sink(graph: str, seen: Mapping[str, Observation]) -> None:
        for name, one in seen.items():
            if not (np.isfinite(one.total).all() and np.isfinite(one.amax).all()):
                raise BundleError(
                    f"{graph} computes numbers that are not finite ({name}) on the sample at {at.where}.",
                    "Check the checkpoint; a model in fp16 may need an export with --dtype fp32.",
                )
            tally = tallies.setdefault(
                f"{graph}/{name}", _Tally(np.zeros_like(one.amax), np.zeros(one.total.shape))
            )
            np.maximum(tally.amax, one.amax, out=tally.amax)
            tally.total += one.total
            tally.count += one.count
            tally.rows.append(one.rows)

    progress("calibrating", 0, len(samples))
    with observed_pipeline(bundle, watched, -(-_ROWS // len(samples)), sink) as pipeline:
        for index, sample in enumerate(samples):
            at = sample
            ask(pipeline, sample, NEW_TOKENS)
            progress("calibrating", index + 1, len(samples))
    found = {
        name: Statistics(
            tally.amax, (tally.total / max(1, tally.count)).astype(np.float32), np.concatenate(tally.rows)
        )
        for name, tally in tallies.items()
    }
    _write(memory, found)
    return found


def ask(pipeline: Pipeline, sample: Sample, new_tokens: int) -> Generation:
    """What a bundle answers to a sample.

    Raises:
        InputError: The prompt is too long, or contains the image token; the line is named.
    """
    try:
        return pipeline.generate(sample.image, sample.prompt, max_new_tokens=new_tokens)
    except InputError as error:
        raise InputError(f"{sample.where}: {error.what}", error.hint) from None


def observed_pipeline(
    bundle: Bundle,
    watched: Watched,
    most_rows: int,
    sink: Sink,
    wrap: Callable[[str, Runner], Runner] = lambda _, runner: runner,
) -> Pipeline:
    """The bundle's pipeline on the CPU, with some values of its graphs observed.

    Args:
        bundle: The bundle.
        watched: The values.
        most_rows: About how many rows of each value are taken in one run of its graph.
        sink: Takes what is seen.
        wrap: What goes around the runner of each graph, by its name.
    """
    options = calm()
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name in {stage.graph: None for stage in bundle.manifest.stages}:
            widths = watched.get(name)
            opened: Runner
            if widths:
                opened = observed(bundle, name, widths, most_rows, sink, options)
            else:
                opened = open_cpu(bundle, name, options)
            runners[name] = wrap(name, stack.enter_context(opened))
        pipeline = Pipeline(bundle, runners, options)
        stack.pop_all()  # the pipeline closes them
    return pipeline


def observed(
    bundle: Bundle,
    graph: str,
    widths: Mapping[str, int],
    most_rows: int,
    sink: Sink,
    options: BackendOptions,
) -> Runner:
    """One graph of a bundle, with some of its values observed."""
    model = load_graph(bundle, graph)
    add_observations(model, widths, most_rows)
    return Observer(open_model(*serialize(model), graph, options), graph, list(widths), sink)


def calm() -> BackendOptions:
    """All cores, weights mapped from their files: what is measured is numbers, and not time."""
    return BackendOptions("cpu", usable_cores(), low_memory=True)


def _key(bundle: Bundle, samples: Sequence[Sample], watched: Watched) -> str:
    """Of everything that statistics depend on."""
    counts = f"{__version__} {_FORMAT} {NEW_TOKENS} {_ROWS}"
    digest = hashlib.sha256(f"{counts} {bundle.manifest.pruning}".encode())
    for name, record in sorted(bundle.manifest.files.items()):
        digest.update(f"{name} {record.sha256}\n".encode())
    for sample in samples:
        image = sample.image
        seen = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else sha256(image)
        digest.update(f"{seen} {sample.prompt}\n".encode())
    for graph, widths in watched.items():
        digest.update(f"{graph} {sorted(widths)}\n".encode())
    return digest.hexdigest()[:32]


def _read(memory: Path) -> dict[str, Statistics] | None:
    try:
        with np.load(memory, allow_pickle=False) as file:
            arrays = dict(file)
        names = {key.rpartition("|")[0] for key in arrays}
        return {n: Statistics(*(arrays[f"{n}|{part}"] for part in _PARTS)) for n in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(memory: Path, found: Mapping[str, Statistics]) -> None:
    arrays = {
        f"{name}|{part}": getattr(one, part)
        for name, one in found.items()
        for part in ("amax", "mean", "rows")
    }
    keep(memory, lambda file: np.savez(file, **arrays))
