"""Calibration: run a bundle on samples, and collect statistics of the inputs of its linear layers.

The whole pipeline runs, so the statistics are of the visual tokens that pruning keeps, and of a few decoded
tokens. Weights stay mapped from their files. Statistics are cached by the hashes of the bundle and the
samples.
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
from visprune.quantize.bundle_graphs import load_graph, serialize
from visprune.quantize.observe import ObservedValue, Observer, Sink, add_observations
from visprune.records import sha256
from visprune.runtime.backends.ort_cpu import open_cpu, open_model
from visprune.runtime.backends.runner import BackendOptions, Runner
from visprune.runtime.generation import Generation
from visprune.runtime.pipeline import Pipeline
from visprune.runtime.samples import Sample
from visprune.version import __version__

__all__ = [
    "Statistics",
    "ValueWidths",
    "answer_sample",
    "calibrate",
    "low_memory_options",
    "observed_graph",
    "observed_pipeline",
]

Array = NDArray[np.float32]

ValueWidths = Mapping[str, Mapping[str, int]]
"""Values to observe: by the name of a graph, the name of each value and its number of channels."""

CALIBRATION_TOKENS = 8
"""Tokens decoded after each prompt, so that statistics are not only those of a prefill."""

_ROWS = 256  # rows sampled of each value, over all samples
_FORMAT = 1  # of the cache entries
_PARTS = ("amax", "mean", "rows")


@dataclass(slots=True)
class Statistics:
    """Statistics of one activation over all samples.

    Attributes:
        amax: Largest magnitude of each channel, over every token, [K].
        mean: Mean magnitude of each channel, over every token, [K].
        rows: Sampled tokens, [R, K].
    """

    amax: Array
    mean: Array
    rows: Array


@dataclass(slots=True)
class _Tally:
    """Running totals of one observed value, over the runs so far."""

    amax: Array
    total: NDArray[np.float64]
    count: int = 0
    rows: list[Array] = field(default_factory=list)


def calibrate(
    bundle: Bundle, samples: Sequence[Sample], widths: ValueWidths, progress: Progress
) -> dict[str, Statistics]:
    """Return statistics of some values, from the cache or by running the bundle.

    Args:
        bundle: The float bundle.
        samples: Images and prompts to run it on.
        widths: The values to observe.
        progress: Called as the work goes on.

    Returns:
        The statistics of each value, by "graph/value".

    Raises:
        BundleError: An activation is not finite.
        InputError: A prompt is too long, or contains the image token.
    """
    entry = cache_dir("calibration") / f"{_key(bundle, samples, widths)}.npz"
    known = _read(entry)
    if known is not None:
        progress("calibrating (remembered)", 1, 1)
        return known
    tallies: dict[str, _Tally] = {}
    current = samples[0]

    def sink(graph: str, seen: Mapping[str, ObservedValue]) -> None:
        for name, one in seen.items():
            if not (np.isfinite(one.total).all() and np.isfinite(one.amax).all()):
                raise BundleError(
                    f"{graph} computes numbers that are not finite ({name}) on the sample at "
                    f"{current.where}.",
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
    with observed_pipeline(bundle, widths, -(-_ROWS // len(samples)), sink) as pipeline:
        for index, sample in enumerate(samples):
            current = sample
            answer_sample(pipeline, sample, CALIBRATION_TOKENS)
            progress("calibrating", index + 1, len(samples))
    found = {
        name: Statistics(
            tally.amax, (tally.total / max(1, tally.count)).astype(np.float32), np.concatenate(tally.rows)
        )
        for name, tally in tallies.items()
    }
    _write(entry, found)
    return found


def answer_sample(pipeline: Pipeline, sample: Sample, new_tokens: int) -> Generation:
    """Generate the greedy answer of a pipeline to a sample.

    Raises:
        InputError: The prompt is too long, or contains the image token; the message names the line.
    """
    try:
        return pipeline.generate(sample.image, sample.prompt, max_new_tokens=new_tokens)
    except InputError as error:
        raise InputError(f"{sample.where}: {error.what}", error.hint) from None


def observed_pipeline(
    bundle: Bundle,
    widths: ValueWidths,
    most_rows: int,
    sink: Sink,
    wrap: Callable[[str, Runner], Runner] = lambda _, runner: runner,
) -> Pipeline:
    """Open a bundle's pipeline on the CPU, with some values of its graphs observed.

    Args:
        bundle: The bundle.
        widths: The values to observe.
        most_rows: About how many rows of each value are sampled in one run of its graph.
        sink: Called with the observed values after each run of a graph.
        wrap: Called with the name and the runner of each graph; the pipeline uses the runner it returns.
    """
    options = low_memory_options()
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name in {stage.graph: None for stage in bundle.manifest.stages}:
            observed = widths.get(name)
            opened: Runner
            if observed:
                opened = observed_graph(bundle, name, observed, most_rows, sink, options)
            else:
                opened = open_cpu(bundle, name, options)
            runners[name] = wrap(name, stack.enter_context(opened))
        pipeline = Pipeline(bundle, runners, options)
        stack.pop_all()  # the pipeline closes the runners
    return pipeline


def observed_graph(
    bundle: Bundle,
    graph: str,
    widths: Mapping[str, int],
    most_rows: int,
    sink: Sink,
    options: BackendOptions,
) -> Runner:
    """Open one graph of a bundle, with some of its values observed; see `observed_pipeline`."""
    model = load_graph(bundle, graph)
    add_observations(model, widths, most_rows)
    return Observer(open_model(*serialize(model), graph, options), graph, list(widths), sink)


def low_memory_options() -> BackendOptions:
    """Return options with all cores and with weights mapped from their files.

    Mapped weights are slower. That does not matter here, because values are measured and not time.
    """
    return BackendOptions("cpu", usable_cores(), low_memory=True)


def _key(bundle: Bundle, samples: Sequence[Sample], widths: ValueWidths) -> str:
    """Return a hash of everything that the statistics depend on."""
    counts = f"{__version__} {_FORMAT} {CALIBRATION_TOKENS} {_ROWS}"
    digest = hashlib.sha256(f"{counts} {bundle.manifest.pruning}".encode())
    for name, record in sorted(bundle.manifest.files.items()):
        digest.update(f"{name} {record.sha256}\n".encode())
    for sample in samples:
        image = sample.image
        seen = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else sha256(image)
        digest.update(f"{seen} {sample.prompt}\n".encode())
    for graph, observed in widths.items():
        digest.update(f"{graph} {sorted(observed)}\n".encode())
    return digest.hexdigest()[:32]


def _read(entry: Path) -> dict[str, Statistics] | None:
    """Read a cache entry; None if there is none, or it is damaged."""
    try:
        with np.load(entry, allow_pickle=False) as file:
            arrays = dict(file)
        names = {key.rpartition("|")[0] for key in arrays}
        found = {n: Statistics(*(arrays[f"{n}|{part}"] for part in _PARTS)) for n in names}
    except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return None
    return found or None


def _write(entry: Path, found: Mapping[str, Statistics]) -> None:
    arrays = {f"{name}|{part}": getattr(one, part) for name, one in found.items() for part in _PARTS}
    keep(entry, lambda file: np.savez(file, **arrays))
