"""How a quantized linear layer is spelled in a graph: a function for each precision.

    int8, fp8       x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- W
    int8-dynamic    DynamicQuantizeMatMul, of ONNX Runtime: the range of x is found as it comes
    int4            MatMulNBits, of ONNX Runtime; for TensorRT a blocked DequantizeLinear before the MatMul

ONNX Runtime makes an integer kernel of the first form only where each linear layer has a QuantizeLinear of
its own, and merges equal ones. So layers that share an activation get scales that differ in the last bit. For
TensorRT they share it, and are multiplied at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from visprune.quantize.linears import Linear
from visprune.quantize.numerics import Fp8, Int4, Int8, NumberFormat

__all__ = ["FORMS", "MICROSOFT", "Builder", "Weight", "number_format"]

MICROSOFT = "com.microsoft"
Lazy = Callable[[], NDArray[Any]]


def number_format(precision: str, block: int) -> NumberFormat:
    """The numbers that a precision stores weights in."""
    if precision == "int4":
        return Int4(block)
    return Fp8() if precision == "fp8" else Int8()


@dataclass(slots=True)
class Weight:
    """A linear layer's weight as it will be stored; read, changed and rounded when it is asked for.

    Attributes:
        load: W [K, N] float32, smoothing included.
        form: Its numbers.
        dtype: The float type of the graph.
    """

    load: Lazy
    form: NumberFormat
    dtype: np.dtype
    _last: tuple[NDArray[Any], NDArray[Any]] | None = None

    def scales(self) -> NDArray[Any]:
        """Its scales."""
        return self._both()[1]

    def stored(self) -> NDArray[Any]:
        """Its numbers, [K, N]. They are asked for last, and forgotten with that."""
        numbers = self._both()[0]
        self._last = None
        return numbers

    def _both(self) -> tuple[NDArray[Any], NDArray[Any]]:
        if self._last is None:
            weight = self.load()
            scales = self.form.weight_scales(weight, self.dtype)
            self._last = (self.form.round_weight(weight, scales), scales)
        return self._last


@dataclass(slots=True)
class Builder:
    """Puts nodes and weights into a graph.

    Attributes:
        graph: The graph.
        dtype: Its float type.
        shares: Whether layers that read one activation share its quantization.
        block: Inputs to a scale, for int4.
    """

    graph: ir.Graph
    dtype: np.dtype
    shares: bool
    block: int
    nodes: list[ir.Node] = field(default_factory=list)
    _quantized: dict[tuple[ir.Value, str], ir.Value] = field(default_factory=dict)
    _steps: dict[ir.Value, int] = field(default_factory=dict)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small initialiser."""
        return self.lazy(name, ir.DataType.from_numpy(array.dtype), array.shape, lambda: array)

    def lazy(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Lazy) -> ir.Value:
        """An initialiser that is made as it is written, and kept by nobody."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.LazyTensor(
            lambda: ir.tensor(make(), dtype=dtype, name=name), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.register_initializer(value)
        return value

    def node(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: int) -> ir.Value:
        """A node with one output."""
        made = ir.node(op, inputs, attributes=attributes or None, domain=domain)
        self.nodes.append(made)
        return made.outputs[0]

    def quantized(self, x: ir.Value, scale: float, zero: NDArray[Any]) -> ir.Value:
        """X after rounding, as floats again."""
        key = (x, zero.dtype.name)
        if self.shares and key in self._quantized:
            return self._quantized[key]
        step = 0 if self.shares else self._steps.get(x, 0)
        self._steps[x] = step + 1
        number = np.asarray(max(scale, float(np.finfo(self.dtype).smallest_subnormal)), self.dtype)
        for _ in range(step):
            number = np.nextafter(number, np.asarray(np.inf, self.dtype))
        name = f"{x.name}.scale{step or ''}"
        factor = self.constant(name, number)
        zero_point = self.constant(f"zero.{zero.dtype.name}", zero)
        rounded = self.node("QuantizeLinear", x, factor, zero_point)
        self._quantized[key] = self.node("DequantizeLinear", rounded, factor, zero_point)
        return self._quantized[key]

    def biased(self, product: ir.Value, linear: Linear, bias: ir.Value | None, add: str = "Add") -> ir.Value:
        """A product with its layer's bias."""
        return product if bias is None else self.node(add, product, bias)


Bias = ir.Value | None
Form = Callable[[Builder, Linear, Weight, Bias, "float | None"], ir.Value]


def _int8(to: Builder, linear: Linear, weight: Weight, bias: Bias, scale: float | None) -> ir.Value:
    return _quantize_dequantize(to, linear, weight, bias, scale, np.zeros((), np.int8))


def _fp8(to: Builder, linear: Linear, weight: Weight, bias: Bias, scale: float | None) -> ir.Value:
    return _quantize_dequantize(to, linear, weight, bias, scale, np.zeros((), ml_dtypes.float8_e4m3fn))


def _quantize_dequantize(
    to: Builder, linear: Linear, weight: Weight, bias: Bias, scale: float | None, zero: NDArray[Any]
) -> ir.Value:
    assert scale is not None
    scales = _scales(to, linear, weight, (linear.shape[1],))
    kind = ir.DataType.from_numpy(zero.dtype)
    stored = to.lazy(f"{linear.name}.quantized", kind, linear.shape, weight.stored)
    # ONNX Runtime's optimizers take a missing zero point for a single one, and stumble over a shared one.
    zeros = to.constant(f"{linear.name}.zeros", np.zeros(linear.shape[1], zero.dtype))
    unrounded = to.node("DequantizeLinear", stored, scales, zeros, axis=1)
    # ONNX Runtime makes a float Gemm of a flat product and an Add before it looks for quantized products.
    flat = linear.nodes[0].op_type == "Gemm" or len(linear.x.shape or ()) == 2
    add = "Sum" if flat and not to.shares else "Add"
    return to.biased(to.node("MatMul", to.quantized(linear.x, scale, zero), unrounded), linear, bias, add)


def _int8_dynamic(to: Builder, linear: Linear, weight: Weight, bias: Bias, scale: float | None) -> ir.Value:
    scales = _scales(to, linear, weight, (linear.shape[1],))
    stored = to.lazy(f"{linear.name}.quantized", ir.DataType.INT8, linear.shape, weight.stored)
    return to.node("DynamicQuantizeMatMul", linear.x, stored, scales, None, bias, domain=MICROSOFT)


def _int4(to: Builder, linear: Linear, weight: Weight, bias: Bias, scale: float | None) -> ir.Value:
    rows, columns = linear.shape
    blocks = -(-rows // to.block)
    if to.shares:
        scales = _scales(to, linear, weight, (blocks, columns))
        stored = to.lazy(
            f"{linear.name}.quantized",
            ir.DataType.INT4,
            linear.shape,
            lambda: weight.stored().astype(ml_dtypes.int4),
        )
        unrounded = to.node("DequantizeLinear", stored, scales, axis=0, block_size=to.block)
        return to.biased(to.node("MatMul", linear.x, unrounded), linear, bias)
    scales = to.lazy(
        f"{linear.name}.scales",
        _kind(to.dtype),
        (columns, blocks),
        lambda: np.ascontiguousarray(weight.scales().T),
    )
    packed = to.lazy(
        f"{linear.name}.quantized",
        ir.DataType.UINT8,
        (columns, blocks, to.block // 2),
        lambda: pack(weight.stored(), to.block),
    )
    return to.node(
        "MatMulNBits",
        linear.x,
        packed,
        scales,
        None,
        None,
        bias,
        domain=MICROSOFT,
        K=rows,
        N=columns,
        bits=4,
        block_size=to.block,
        accuracy_level=4,  # activations are rounded to int8 in blocks: integer arithmetic
    )


FORMS: dict[str, Form] = {"int8": _int8, "int8-dynamic": _int8_dynamic, "fp8": _fp8, "int4": _int4}
"""What spells a linear layer in each precision. It takes the builder, the layer, its weight, its bias and the
scale of its activation, and gives the layer's output."""


def pack(stored: NDArray[Any], block: int) -> NDArray[np.uint8]:
    """Four-bit integers [K, N] as `MatMulNBits` takes them: [N, K / block, block / 2], two to a byte, + 8."""
    rows, columns = stored.shape
    padded = np.pad(stored.astype(np.int8) + 8, ((0, -rows % block), (0, 0)), constant_values=8)
    blocks = padded.T.astype(np.uint8).reshape(columns, -1, block)
    return np.ascontiguousarray(blocks[..., ::2] | (blocks[..., 1::2] << 4))


def _scales(to: Builder, linear: Linear, weight: Weight, shape: tuple[int, ...]) -> ir.Value:
    return to.lazy(f"{linear.name}.scales", _kind(to.dtype), shape, weight.scales)


def _kind(dtype: np.dtype) -> ir.DataType:
    return ir.DataType.from_numpy(dtype)
