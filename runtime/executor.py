"""Executor of a manifest's stages, which are a dataflow program over named values.

It knows stages, values and runners, but neither the model nor the meaning of a value (tokens, images): that
is up to the code that supplies or asks for the value. The one value that it knows is `pixel_values`: what
depends on nothing else can be kept for the next question about the same image.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visprune.errors import BundleError, UsageError
from visprune.manifest import Graph, Stage, TensorSpec
from visprune.runtime.backends.opening import Opening
from visprune.runtime.backends.runner import Runner, Value, size_in_bytes, to_numpy
from visprune.runtime.bounded import BoundedCache

__all__ = ["Execution", "Executor", "PictureCache"]

_PIXELS = "pixel_values"
PictureCache: TypeAlias = "BoundedCache[bytes, dict[str, Value]]"
"""Values that were computed from the pixels of an image, by the digest of the pixels."""


@dataclass(frozen=True, slots=True)
class Execution:
    """The result of one run of the program.

    Attributes:
        values: Wanted values that were assigned, except those of single images.
        images: For each image, the wanted values that its stages assigned.
        timings_ms: Milliseconds of each stage that ran, by graph, in order; and of waiting for graphs that
            were still being opened, as `opening`.
        images_cached: Number of images whose features were in the cache of pictures.
    """

    values: dict[str, Value]
    images: tuple[dict[str, Value], ...]
    timings_ms: dict[str, float]
    images_cached: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """A stage, with facts about its values that were computed in advance."""

    stage: Stage
    specs: dict[str, TensorSpec]  # of the inputs, by value name
    done_after: tuple[str, ...]  # values that no later step reads


class Executor:
    """The stages of a bundle, with a runner for each graph.

    Args:
        stages: Stages in order. `Bundle.open` has checked that they assign every value once.
        graphs: Interfaces of the graphs.
        runners: Runners of the graphs.
        wanted: Names of the values to return; names that no stage assigns are ignored.
        pictures: Cache of what the stages compute that read nothing but the pixels of an image. By default
            nothing is kept.

    Raises:
        BundleError: A stage reads a value before it is assigned, or a stage of single images comes after a
            stage of the whole prompt.
    """

    def __init__(
        self,
        stages: Iterable[Stage],
        graphs: Mapping[str, Graph],
        runners: Mapping[str, Runner],
        wanted: Iterable[str],
        pictures: PictureCache | None = None,
    ) -> None:
        stages = tuple(stages)
        self._runners = runners
        self._pictures: PictureCache = BoundedCache(0) if pictures is None else pictures
        assigned = {value for stage in stages for value in stage.outputs.values()}
        self._wanted = frozenset(wanted) & assigned
        self.inputs: dict[str, TensorSpec] = {}
        """Values that must be supplied, since no stage assigns them, with the specs of their first reader."""
        seen: set[str] = set()
        last_reader: dict[str, int] = {}
        all_specs: list[dict[str, TensorSpec]] = []
        for index, stage in enumerate(stages):
            by_tensor = {spec.name: spec for spec in graphs[stage.graph].inputs}
            specs = {value: by_tensor[tensor] for tensor, value in stage.inputs.items()}
            for value, spec in specs.items():
                if value in assigned and value not in seen:
                    raise BundleError(
                        f"The stage {stage.graph!r} reads {value!r} before it is assigned.", "Export again."
                    )
                if value not in assigned:
                    self.inputs.setdefault(value, spec)
                last_reader[value] = index
            # A value that no stage reads can be freed after its own stage.
            last_reader |= {value: index for value in stage.outputs.values() if value not in last_reader}
            seen |= set(stage.outputs.values())
            all_specs.append(specs)
        steps = [
            _Step(
                stage,
                specs,
                tuple(v for v, last in last_reader.items() if last == i and v not in self._wanted),
            )
            for i, (stage, specs) in enumerate(zip(stages, all_specs, strict=True))
        ]
        count = sum(stage.when == "image" for stage in stages)
        if any(step.stage.when == "image" for step in steps[count:]):
            raise BundleError("A stage of single images follows one of the whole prompt.", "Export again.")
        self._steps = steps[count:]
        self._pixel_steps, self._image_steps = _split(steps[:count])
        self._dtypes = {
            step.stage.outputs[spec.name]: spec.dtype
            for step in self._pixel_steps
            for spec in graphs[step.stage.graph].outputs
            if spec.name in step.stage.outputs
        }
        made = {value for step in steps[:count] for value in step.stage.outputs.values()}
        self._joined = tuple(made & {value for step in self._steps for value in step.specs})

    @property
    def outputs(self) -> frozenset[str]:
        """The wanted values that some stage assigns."""
        return self._wanted

    def run(self, supplied: Mapping[str, Value], images: Sequence[Mapping[str, Value]] = ()) -> Execution:
        """Run every stage once, and those marked `image` once for each new image.

        Args:
            supplied: The values named by `inputs`, except those in `images`. Floating-point host arrays are
                cast to the dtype that a graph takes.
            images: For each new image, its own values. The values that its stages assign are joined along the
                first axis for later stages. Without images, stages marked `image` or `visual` do not run;
                their values are then taken from their `bypass`, or are empty (symbolic dimensions are 0).

        Raises:
            UsageError: The pipeline was closed.
        """
        if not self._runners:
            raise UsageError("The pipeline is closed.", "Load the bundle again.")
        timings: dict[str, float] = {}
        seen = []
        hits = self._pictures.hits
        for image in images:
            values = {**supplied, **image, **self._features(image, timings)}
            self._run(self._image_steps, values, timings, visual=True)
            seen.append({name: values[name] for name in (*self._joined, *self._wanted) if name in values})
        values = {
            **supplied,
            **{name: _join([image[name] for image in seen]) for name in self._joined if seen},
        }
        own = tuple({n: v for n, v in image.items() if n in self._wanted} for image in seen)
        del seen
        self._run(self._steps, values, timings, visual=bool(images))
        found = {name: values[name] for name in self._wanted if name in values}
        return Execution(found, own, timings, self._pictures.hits - hits)

    def _features(self, image: Mapping[str, Value], timings: dict[str, float]) -> dict[str, Value]:
        """Return the values that depend on the pixels of an image alone, computed unless they are cached."""
        if not self._pixel_steps:
            return {}
        pixels = to_numpy(image[_PIXELS])
        key = _digest(pixels) if self._pictures.limit else b""
        found = self._pictures.get(key) if key else None
        if found is None:
            values: dict[str, Value] = {_PIXELS: pixels}
            self._run(self._pixel_steps, values, timings, visual=True)
            found = {name: made for name, made in values.items() if name != _PIXELS}
            if key:
                size = sum(size_in_bytes(made, self._dtypes[name]) for name, made in found.items())
                self._pictures.put(key, found, size)
        return found

    def _run(
        self, steps: Sequence[_Step], values: dict[str, Value], timings: dict[str, float], *, visual: bool
    ) -> None:
        """Run steps on `values`. The values they assign stay there as long as they are wanted or read."""
        for step in steps:
            stage = step.stage
            if stage.when == "visual" and not visual:
                values |= {v: values[source] for v, source in stage.bypass.items() if source in values}
            else:
                feeds = {
                    tensor: _cast_float(values[value], step.specs[value])
                    if value in values
                    else _empty_input(step.specs[value])
                    for tensor, value in stage.inputs.items()
                }
                runner = self._runner(stage.graph, timings)
                start = time.perf_counter()
                outputs = runner.infer(feeds)
                timings[stage.graph] = timings.get(stage.graph, 0.0) + (time.perf_counter() - start) * 1e3
                values |= {value: outputs[tensor] for tensor, value in stage.outputs.items()}
                del feeds, outputs  # they hold references to values that are freed next
            for value in step.done_after:
                values.pop(value, None)

    def _runner(self, graph: str, timings: dict[str, float]) -> Runner:
        """Return the runner of a graph. The time until it is open is added to the timing `opening`."""
        runner = self._runners[graph]
        if isinstance(runner, Opening) and not runner.over:
            start = time.perf_counter()
            runner = runner.wait()
            timings["opening"] = timings.get("opening", 0.0) + (time.perf_counter() - start) * 1e3
        return runner


def _split(steps: Sequence[_Step]) -> tuple[list[_Step], list[_Step]]:
    """Split the stages of one image into those that depend on its pixels alone, and the others."""
    known = {_PIXELS}
    pixel_steps, others = [], []
    for step in steps:
        if step.specs.keys() <= known:
            known |= set(step.stage.outputs.values())
            pixel_steps.append(step)
        else:
            others.append(step)
    return pixel_steps, others


def _digest(array: NDArray[Any]) -> bytes:
    """Return a digest of the content and the shape of an array."""
    found = hashlib.blake2b(repr((array.shape, array.dtype.str)).encode(), digest_size=16)
    found.update(np.ascontiguousarray(array).data)
    return found.digest()


def _join(parts: Sequence[Value]) -> Value:
    """Concatenate values along the first axis. A single value is returned as it is, without a copy."""
    return parts[0] if len(parts) == 1 else np.concatenate([to_numpy(part) for part in parts])


def _cast_float(value: Value, spec: TensorSpec) -> Value:
    """Cast a floating-point host array to the dtype of the graph; return any other value as it is."""
    wanted = np.dtype(spec.dtype)
    if isinstance(value, np.ndarray) and value.dtype != wanted and wanted.kind == value.dtype.kind == "f":
        return value.astype(wanted)
    return value


def _empty_input(spec: TensorSpec) -> np.ndarray[Any, Any]:
    return np.zeros([dim if isinstance(dim, int) else 0 for dim in spec.shape], dtype=spec.dtype)
