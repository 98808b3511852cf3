"""The choices for the linear layers of a graph: precision, factors of channels, range of the activation.

Layers that read the same activation get the same choices. The factors are chosen first (see `carriers`):
those that change the outputs of the layers least on sampled tokens. The range of the activation is chosen
next, by the same measure (see `ranges`).
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
from visprune.quantize.quantize_options import FLOAT, WEIGHTS_ONLY, ResolvedOptions
from visprune.quantize.ranges import candidates

__all__ = ["GraphChoices", "LayerChoice", "choose_layers"]

Array = NDArray[np.float32]

# Exponents tried for SmoothQuant and for AWQ; 0 stands for no factors.
_SMOOTH = (0.0, 0.3, 0.5, 0.65, 0.8)
_AWQ = tuple(step / 10 for step in range(10))
# Output channels and tokens that errors are measured on; so many are enough to choose by.
_COLUMNS, _TOKENS = 256, 128


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """How one linear layer is quantized.

    Attributes:
        precision: Precision of its weight, and of its activation if both are rounded; "float" if the layer is
            left float.
        scale: Scale of its activation; None if the activation is not rounded, or its range is found at run
            time.
        error: Relative error of its output on calibration samples; None if there are none.
        note: Why it is left float, if it is.
    """

    precision: str
    scale: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(slots=True)
class GraphChoices:
    """How a graph is quantized.

    Attributes:
        layers: The choice for each linear layer, by its name.
        rows: By the name of a layer, the factors that the rows of its weight are multiplied by, [K].
        columns: By the name of a layer, the factors that its columns and bias are divided by, [N].
        norms: By the name of a norm's output, the factors that the weights of the norm are divided by, [K].
    """

    layers: dict[str, LayerChoice] = field(default_factory=dict)
    rows: dict[str, Array] = field(default_factory=dict)
    columns: dict[str, Array] = field(default_factory=dict)
    norms: dict[str, Array] = field(default_factory=dict)


def choose_layers(
    name: str,
    graph: ir.Graph,
    statistics: Mapping[str, Statistics],
    resolved: ResolvedOptions,
    *,
    products: bool = True,
) -> GraphChoices:
    """Choose how each linear layer of a graph is quantized.

    Args:
        name: Name of the graph.
        graph: The float graph with its weights. It is not changed.
        statistics: Statistics of the activations, by "graph/value"; empty without calibration.
        resolved: The options, as resolved for the bundle.
        products: Whether linear layers may carry the factors of other layers, as norms may.
    """
    linears = find_linears(graph)
    by_output = {linear.y: linear for linear in linears}
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(linear.x, []).append(linear)
    dtype = resolved.numpy_dtype
    choices = GraphChoices()
    for x, group in readers.items():
        precision = resolved.parts[part_of(name, group[0].name)]
        if precision == FLOAT:
            choices.layers |= {linear.name: LayerChoice(FLOAT) for linear in group}
            continue
        size = group[0].shape[0]
        if precision == "int4" and resolved.for_engines and size % resolved.block_size:
            note = f"its {size} inputs are no whole blocks of {resolved.block_size}, as TensorRT needs them"
            choices.layers |= {linear.name: LayerChoice(FLOAT, note=note) for linear in group}
            continue
        form = number_format(precision, resolved.block_size)
        seen = statistics.get(f"{name}/{x.name}")
        if seen is None:
            choices.layers |= {linear.name: LayerChoice(precision) for linear in group}
            continue
        if not seen.amax.any():
            note = "its input was zero in every sample"
            choices.layers |= {linear.name: LayerChoice(FLOAT, note=note) for linear in group}
            continue
        trial = _Trial.begin(form, seen, [_sample_columns(linear.read()) for linear in group], dtype)
        carrier = find_carrier(x, group, by_output if products else {}) if resolved.smooth else None
        factors = None if carrier is None else trial.best_factors(precision)
        if carrier is not None and factors is not None:
            choices.rows |= {linear.name: factors for linear in group}
            if carrier.linear is not None:
                choices.columns[carrier.linear.name] = factors
            else:
                choices.norms[str(x.name)] = factors
            trial = trial.smoothed(factors)
        width, errors = trial.best_range(resolved)
        scale = None if width is None else width / form.largest
        for linear, error in zip(group, errors, strict=True):
            choices.layers[linear.name] = LayerChoice(precision, scale, error)
    choices.layers = {linear.name: choices.layers[linear.name] for linear in linears}  # in graph order
    return choices


@dataclass(frozen=True, slots=True)
class _Trial:
    """Layers that read the same activation, with sampled tokens to measure their errors on.

    Attributes:
        form: Number format of the weights, and of the activation if it can be rounded.
        seen: Statistics of the activation.
        rows: Sampled tokens of the activation, [R, K].
        weights: Sampled columns of each layer's weight, [K, C].
        exact: The float outputs for these, [R, C]. Factors do not change them.
        dtype: Float type of scales.
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
        """Return a trial without factors."""
        rows = seen.rows[:: max(1, len(seen.rows) // _TOKENS)]
        return cls(form, seen, rows, weights, [rows @ weight for weight in weights], dtype)

    def smoothed(self, factors: Array) -> _Trial:
        """Return this trial with the activation divided by factors [K] and the weights multiplied by them."""
        seen = Statistics(self.seen.amax / factors, self.seen.mean / factors, self.seen.rows / factors)
        weights = [factors[:, None] * weight for weight in self.weights]
        return replace(self, seen=seen, rows=self.rows / factors, weights=weights)

    def errors(self, width: float | None) -> list[float]:
        """Return the relative error of each layer.

        Args:
            width: The range that the activation is clipped to; None leaves the activation float.
        """
        rounded = self.rows
        if width is not None and isinstance(self.form, (Int8, Fp8)):
            rounded = self.form.activation(rounded, width / self.form.largest)
        return [
            relative_error(exact, rounded @ fake_weight(self.form, weight, self.dtype))
            for exact, weight in zip(self.exact, self.weights, strict=True)
        ]

    def best_factors(self, precision: str) -> Array | None:
        """Return the factors with the least error at the whole range; None if no factors are best."""
        found: list[tuple[float, Array | None]] = []
        for exponent in _AWQ if precision in WEIGHTS_ONLY else _SMOOTH:
            factors = self._factors(exponent, precision) if exponent else None
            trial = self if factors is None else self.smoothed(factors)
            width = None if precision in WEIGHTS_ONLY else float(trial.seen.amax.max())
            found.append((float(np.square(trial.errors(width)).sum()), factors))
        return min(found, key=lambda pair: pair[0])[1]

    def _factors(self, exponent: float, precision: str) -> Array:
        """Return the factors for an exponent a, with a geometric mean of about 1.

        AWQ (section 3.2): mean |x| ^ a. SmoothQuant (equation 4): max |x| ^ a / max |w| ^ (1 - a).
        """
        if precision in WEIGHTS_ONLY:
            logs = exponent * _log(self.seen.mean)
        else:
            weights = np.max([np.abs(weight).max(axis=1) for weight in self.weights], axis=0)
            logs = exponent * _log(self.seen.amax) - (1.0 - exponent) * _log(weights)
        factors: Array = np.exp(np.clip(logs - logs.mean(), -6.0, 6.0)).astype(np.float32)
        return factors

    def best_range(self, resolved: ResolvedOptions) -> tuple[float | None, list[float]]:
        """Return the range with the least error, and the error of each layer; None if no range is needed."""
        if not isinstance(self.form, (Int8, Fp8)):
            return None, self.errors(None)
        widths = candidates(resolved.ranges, self.seen.rows, float(self.seen.amax.max()))
        tried = [(width, self.errors(width)) for width in widths]
        return min(tried, key=lambda pair: float(np.square(pair[1]).sum()))


def _log(x: Array) -> Array:
    """Return logarithms of magnitudes; a zero counts as the smallest magnitude that is not zero."""
    some = x[x > 0]
    logs: Array = np.log(np.maximum(x, some.min() if len(some) else 1.0))
    return logs


def _sample_columns(weight: Array) -> Array:
    """Return evenly spaced columns of a weight [K, N]: [K, C], with C at most `_COLUMNS`."""
    step = max(1, weight.shape[1] // _COLUMNS)
    return np.ascontiguousarray(weight[:, ::step][:, :_COLUMNS])
