"""Executor of a manifest's stages, which are a dataflow program over named values.

It knows stages, values and runners, but neither the model nor the meaning of a value (tokens, images): that
is up to the code that supplies or asks for the value.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visprune.errors import BundleError, UsageError
from visprune.manifest import Graph, Stage, TensorSpec
from visprune.runtime.backends.runner import Runner, Value, to_numpy

__all__ = ["Execution", "Executor"]


@dataclass(frozen=True, slots=True)
class Execution:
    """The result of one run of the program.

    Attributes:
        values: Wanted values that were assigned, except those of single images.
        images: For each image, the wanted values that its stages assigned.
        timings_ms: Milliseconds of each stage that ran, by graph, in order.
    """

    values: dict[str, Value]
    images: tuple[dict[str, Value], ...]
    timings_ms: dict[str, float]


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
    ) -> None:
        stages = tuple(stages)
        self._runners = runners
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
        self._image_steps, self._steps = steps[:count], steps[count:]
        made = {value for step in self._image_steps for value in step.stage.outputs.values()}
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
        for image in images:
            values = {**supplied, **image}
            self._run(self._image_steps, values, timings, visual=True)
            seen.append({name: values[name] for name in (*self._joined, *self._wanted) if name in values})
        values = {
            **supplied,
            **{name: _join([image[name] for image in seen]) for name in self._joined if seen},
        }
        own = tuple({n: v for n, v in image.items() if n in self._wanted} for image in seen)
        del seen
        self._run(self._steps, values, timings, visual=bool(images))
        return Execution({name: values[name] for name in self._wanted if name in values}, own, timings)

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
                start = time.perf_counter()
                outputs = self._runners[stage.graph].infer(feeds)
                timings[stage.graph] = timings.get(stage.graph, 0.0) + (time.perf_counter() - start) * 1e3
                values |= {value: outputs[tensor] for tensor, value in stage.outputs.items()}
                del feeds, outputs  # they hold references to values that are freed next
            for value in step.done_after:
                values.pop(value, None)


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
