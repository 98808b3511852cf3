"""Decide how each linear layer of a graph is quantized: factors, range, and the error that comes of it.

Layers that read one activation are decided for together. First the factors (see `carriers`), by how much the
layers' outputs change on sampled tokens; then the range of the activation, likewise (see `ranges`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from visprune.quantize.calibration import Statistics
from visprune.quantize.carriers import find_carrier
from visprune.quantize.forms import number_format
from visprune.quantize.linears import Linear, find_linears, part_of
from visprune.quantize.numerics import Fp8, Int8, NumberFormat, fake_weight, relative_error
from visprune.quantize.quantize_options import FLOAT, Settings
from visprune.quantize.ranges import candidates

__all__ = ["GraphPlan", "LayerPlan", "plan_graph"]

Array = NDArray[np.float32]

# SmoothQuant's and AWQ's exponents; 0 is no factors at all.
_SMOOTH = (0.0, 0.3, 0.5, 0.65, 0.8)
_AWQ = tuple(step / 10 for step in range(10))
# Output channels and tokens that errors are measured on: enough for a choice.
_COLUMNS, _TOKENS = 256, 128


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one linear layer is quantized.

    Attributes:
        precision: Of its weight, and of its activation where both are rounded; "float" where it is left.
        scale: Of its activation; None where that is not rounded, or as it comes.
        error: Relative error of its output on calibration samples; None where there are none.
        note: Why it is left, if it is.
    """

    precision: str
    scale: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(slots=True)
class GraphPlan:
    """How a graph is quantized.

    Attributes:
        layers: The plan of each linear layer, by its name.
        rows: Factors that the rows of a layer's weight are multiplied with, [K], by its name.
        columns: Factors that its columns and bias are divided by, [N].
        norms: Factors that the weights of a norm are divided by, by the name of what the norm puts out.
    """

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    rows: dict[str, Array] = field(default_factory=dict)
    columns: dict[str, Array] = field(default_factory=dict)
    norms: dict[str, Array] = field(default_factory=dict)


def plan_graph(
    name: str,
    graph: ir.Graph,
    statistics: Mapping[str, Statistics],
    settings: Settings,
    *,
    products: bool = True,
) -> GraphPlan:
    """Decide for all linear layers of a graph.

    Args:
        name: Of the graph.
        graph: With its weights, unchanged.
        statistics: Of the activations, by "graph/value"; empty where nothing was calibrated.
        settings: What was asked for.
        products: Whether linear layers may carry the factors of others, and not only norms.
    """
    linears = find_linears(graph)
    by_output = {linear.y: linear for linear in linears}
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(linear.x, []).append(linear)
    dtype = settings.numpy_dtype
    plan = GraphPlan()
    for x, group in readers.items():
        precision = settings.parts[part_of(name, group[0].name)]
        if precision == FLOAT:
            plan.layers |= {linear.name: LayerPlan(FLOAT) for linear in group}
            continue
        size = group[0].shape[0]
        if precision == "int4" and settings.for_engines and size % settings.block_size:
            note = f"its {size} inputs are no whole blocks of {settings.block_size}, as TensorRT needs them"
            plan.layers |= {linear.name: LayerPlan(FLOAT, note=note) for linear in group}
            continue
        form = number_format(precision, settings.block_size)
        seen = statistics.get(f"{name}/{x.name}")
        if seen is None:
            plan.layers |= {linear.name: LayerPlan(precision) for linear in group}
            continue
        if not seen.amax.any():
            note = "its input was zero in every sample"
            plan.layers |= {linear.name: LayerPlan(FLOAT, note=note) for linear in group}
            continue
        trial = _Trial.begin(form, seen, [_some(linear.read()) for linear in group], dtype)
        carrier = find_carrier(x, group, by_output if products else {}) if settings.smooth else None
        factors = None if carrier is None else trial.best_factors(precision)
        if carrier is not None and factors is not None:
            plan.rows |= {linear.name: factors for linear in group}
            if carrier.linear is not None:
                plan.columns[carrier.linear.name] = factors
            else:
                plan.norms[str(x.name)] = factors
            trial = trial.smoothed(factors)
        width, errors = trial.best_range(settings)
        scale = None if width is None else width / form.largest
        for linear, error in zip(group, errors, strict=True):
            plan.layers[linear.name] = LayerPlan(precision, scale, error)
    plan.layers = {linear.name: plan.layers[linear.name] for linear in linears}  # as in the graph
    return plan


@dataclass(frozen=True, slots=True)
class _Trial:
    """Layers that read one activation, with sampled tokens to try on.

    Attributes:
        form: The numbers of the weights, and of the activation if it can be rounded.
        seen: Statistics of the activation.
        rows: Some of its sampled tokens, [some, K].
        weights: Some columns of each layer's weight, [K, some].
        exact: The outputs of these, [some, some]; factors do not change them.
        dtype: Of scales.
    """

    form: NumberFormat
    seen: Statistics
    rows: Array
    weights: Sequence[Array]
    exact: Sequence[Array]
    dtype: np.dtype[Any]

    @classmethod
    def begin(
        cls, form: NumberFormat, seen: Statistics, weights: Sequence[Array], dtype: np.dtype[Any]
    ) -> _Trial:
        """Without factors."""
        rows = seen.rows[:: max(1, len(seen.rows) // _TOKENS)]
        return cls(form, seen, rows, weights, [rows @ weight for weight in weights], dtype)

    def smoothed(self, factors: Array) -> _Trial:
        """The same with the activation divided and the weights multiplied."""
        seen = Statistics(self.seen.amax / factors, self.seen.mean / factors, self.seen.rows / factors)
        weights = [factors[:, None] * weight for weight in self.weights]
        return replace(self, seen=seen, rows=self.rows / factors, weights=weights)

    def errors(self, width: float | None) -> list[float]:
        """Relative error of each layer, with the activation clipped to a range; None leaves it float."""
        rounded = self.rows
        if width is not None and isinstance(self.form, (Int8, Fp8)):
            rounded = self.form.activation(rounded, width / self.form.largest)
        return [
            relative_error(exact, rounded @ fake_weight(self.form, weight, self.dtype))
            for exact, weight in zip(self.exact, self.weights, strict=True)
        ]

    def best_factors(self, precision: str) -> Array | None:
        """The factors with the least error at the whole range; None where none are best."""
        found: list[tuple[float, Array | None]] = []
        for exponent in _AWQ if precision == "int4" else _SMOOTH:
            factors = self._factors(exponent, precision) if exponent else None
            trial = self if factors is None else self.smoothed(factors)
            width = None if precision == "int4" else float(trial.seen.amax.max())
            found.append((float(np.square(trial.errors(width)).sum()), factors))
        return min(found, key=lambda pair: pair[0])[1]

    def _factors(self, exponent: float, precision: str) -> Array:
        """AWQ: mean |x| ^ a. SmoothQuant: max |x| ^ a / max |w| ^ (1 - a). With a geometric mean of 1."""
        if precision == "int4":
            logs = exponent * _log(self.seen.mean)
        else:
            weights = np.max([np.abs(weight).max(axis=1) for weight in self.weights], axis=0)
            logs = exponent * _log(self.seen.amax) - (1.0 - exponent) * _log(weights)
        factors: Array = np.exp(np.clip(logs - logs.mean(), -6.0, 6.0)).astype(np.float32)
        return factors

    def best_range(self, settings: Settings) -> tuple[float | None, list[float]]:
        """The range with the least error, and the errors."""
        if not isinstance(self.form, (Int8, Fp8)):
            return None, self.errors(None)
        widths = candidates(settings.ranges, self.seen.rows, float(self.seen.amax.max()))
        tried = [(width, self.errors(width)) for width in widths]
        return min(tried, key=lambda pair: float(np.square(pair[1]).sum()))


def _log(x: Array) -> Array:
    """Of magnitudes; a channel without any counts like the smallest that has."""
    some = x[x > 0]
    logs: Array = np.log(np.maximum(x, some.min() if len(some) else 1.0))
    return logs


def _some(weight: Array) -> Array:
    """Evenly spaced columns."""
    step = max(1, weight.shape[1] // _COLUMNS)
    return np.ascontiguousarray(weight[:, ::step][:, :_COLUMNS])
