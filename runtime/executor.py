"""Runs a manifest's stages: a dataflow program over named values.

Knows stages, values and runners. It knows no model, and neither tokens nor images: what a value means
is the business of whoever supplies it or asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from visprune.errors import BundleError
from visprune.manifest import Graph, Stage, TensorSpec
from visprune.runtime.runner import Runner, Value

__all__ = ["Execution", "Executor"]


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of the program.

    Attributes:
        values: The wanted values that the stages which ran have assigned.
        timings_ms: Milliseconds of each stage that ran, by graph, in order.
    """

    values: dict[str, Value]
    timings_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Step:
    """A stage with what was worked out about it beforehand."""

    stage: Stage
    specs: dict[str, TensorSpec]  # of the inputs, by value name
    done_after: tuple[str, ...]  # values that no later step reads


class Executor:
    """The stages of a bundle, with a runner for each graph.

    Args:
        stages: In order; checked by `Bundle.open` to assign every value once.
        graphs: Their interfaces.
        runners: Their runners.
        wanted: Names of the values to hand out; those that no stage assigns are ignored.

    Raises:
        BundleError: A stage reads a value before it is assigned.
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
        """What must be supplied: the values that no stage assigns, as their first reader takes them."""
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
            # A value that nobody reads is done with its own stage.
            last_reader |= {value: index for value in stage.outputs.values() if value not in last_reader}
            seen |= set(stage.outputs.values())
            all_specs.append(specs)
        self._steps = tuple(
            _Step(
                stage,
                specs,
                tuple(v for v, last in last_reader.items() if last == i and v not in self._wanted),
            )
            for i, (stage, specs) in enumerate(zip(stages, all_specs, strict=True))
        )

    @property
    def outputs(self) -> frozenset[str]:
        """The wanted values that the program can give."""
        return self._wanted

    def run(self, supplied: Mapping[str, Value], *, visual: bool) -> Execution:
        """Run every stage once.

        Args:
            supplied: The values named by `inputs`. Floating-point arrays of the host are converted to the
                width a graph takes; those of visual stages may be left out where `visual` is False.
            visual: Whether stages marked `visual` run. Where they do not, the values they would have
                assigned are those of their `bypass`, or empty, their symbolic dimensions being 0.
        """
        values: dict[str, Value] = dict(supplied)
        timings: dict[str, float] = {}
        for step in self._steps:
            stage = step.stage
            if stage.when == "visual" and not visual:
                values |= {v: values[source] for v, source in stage.bypass.items() if source in values}
            else:
                feeds = {
                    tensor: _fit(values[value], step.specs[value])
                    if value in values
                    else _empty(step.specs[value])
                    for tensor, value in stage.inputs.items()
                }
                start = time.perf_counter()
                outputs = self._runners[stage.graph].infer(feeds)
                timings[stage.graph] = timings.get(stage.graph, 0.0) + (time.perf_counter() - start) * 1e3
                values |= {value: outputs[tensor] for tensor, value in stage.outputs.items()}
                del feeds, outputs  # they hold what is freed next
            for value in step.done_after:
                values.pop(value, None)
        return Execution({name: values[name] for name in self._wanted if name in values}, timings)


def _fit(value: Value, spec: TensorSpec) -> Value:
    """A host array in the float width of the graph; everything else as it is."""
    wanted = np.dtype(spec.dtype)
    if isinstance(value, np.ndarray) and value.dtype != wanted and wanted.kind == value.dtype.kind == "f":
        return value.astype(wanted)
    return value


def _empty(spec: TensorSpec) -> np.ndarray[Any, Any]:
    return np.zeros([dim if isinstance(dim, int) else 0 for dim in spec.shape], dtype=spec.dtype)
