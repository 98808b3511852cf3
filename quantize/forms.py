"""The nodes that compute a quantized linear layer: one function for each precision.

    int8, fp8       x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- W
    int8-dynamic    DynamicQuantizeMatMul of ONNX Runtime, which finds the range of x at run time
    int8-weights    MatMulNBits of ONNX Runtime with 8 bits
    int4            MatMulNBits of ONNX Runtime; for TensorRT a blocked DequantizeLinear before the MatMul

ONNX Runtime uses an integer kernel for the first form only if each linear layer has a QuantizeLinear of its
own, and it merges equal ones. So layers that read the same activation get scales that differ in the last bit.
For TensorRT they share one QuantizeLinear, so that it can fuse their products into one.
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
from visprune.quantize.numerics import Blocks, Fp8, Int8, NumberFormat

__all__ = ["FORMS", "MICROSOFT", "Builder", "Weight", "number_format"]

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_BYTE_BLOCK = 128  # inputs that share a scale, for int8-weights: 8 bits gain little from smaller blocks

MakeArray = Callable[[], NDArray[Any]]


def number_format(precision: str, block: int) -> NumberFormat:
    """Return the number format that a precision stores weights in.

    Args:
        precision: Name of the precision.
        block: Inputs that share a scale; used by int4 only.
    """
    if precision == "int4":
        return Blocks(4, block)
    if precision == "int8-weights":
        return Blocks(8, _BYTE_BLOCK)
    return Fp8() if precision == "fp8" else Int8()


@dataclass(slots=True)
class Weight:
    """The weight of a linear layer in its quantized form; it is read and rounded when it is first needed.

    Attributes:
        load: Returns W, [K, N] float32, with the factors of its channels applied.
        form: The number format to store it in.
        dtype: The float type of the graph, which is that of the scales.
    """

    load: MakeArray
    form: NumberFormat
    dtype: np.dtype
    _last: tuple[NDArray[Any], NDArray[Any]] | None = None

    def scales(self) -> NDArray[Any]:
        """Return the scales, in the shape that the number format gives them."""
        return self._quantized()[1]

    def stored(self) -> NDArray[Any]:
        """Return the stored numbers, [K, N], and free them here: they are written after the scales."""
        numbers = self._quantized()[0]
        self._last = None
        return numbers

    def _quantized(self) -> tuple[NDArray[Any], NDArray[Any]]:
        if self._last is None:
            weight = self.load()
            scales = self.form.weight_scales(weight, self.dtype)
            self._last = (self.form.round_weight(weight, scales), scales)
        return self._last


@dataclass(slots=True)
class Builder:
    """Adds nodes and weights to a graph.

    Attributes:
        graph: The graph.
        dtype: Float type of the graph.
        shares: Whether layers that read the same activation share one QuantizeLinear, as TensorRT wants it.
        block: Inputs that share a scale, for int4.
        nodes: The nodes made so far, which the caller inserts into the graph.
    """

    graph: ir.Graph
    dtype: np.dtype
    shares: bool
    block: int
    nodes: list[ir.Node] = field(default_factory=list)
    _quantized: dict[tuple[ir.Value, str], ir.Value] = field(default_factory=dict)
    _steps: dict[ir.Value, int] = field(default_factory=dict)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return an initializer that holds a small array."""
        return self.lazy(name, ir.DataType.from_numpy(array.dtype), array.shape, lambda: array)

    def lazy(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: MakeArray) -> ir.Value:
        """Return an initializer whose array is made when the graph is saved, and freed after that."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.LazyTensor(
            lambda: ir.tensor(make(), dtype=dtype, name=name), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.register_initializer(value)
        return value

    def node(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: int) -> ir.Value:
        """Make a node with one output, and return the output."""
        made = ir.node(op, inputs, attributes=attributes or None, domain=domain)
        self.nodes.append(made)
        return made.outputs[0]

    def quantized(self, x: ir.Value, scale: float, zero: NDArray[Any]) -> ir.Value:
        """Return an activation after QuantizeLinear and DequantizeLinear.

        Args:
            x: The activation.
            scale: Its scale.
            zero: Its zero point, whose type is the one to quantize to.
        """
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

    def biased(self, product: ir.Value, bias: ir.Value | None, add: str = "Add") -> ir.Value:
        """Return a product with a bias added to it, if there is one; `add` is the operator that adds."""
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
    # ONNX Runtime's optimizers take a missing zero point for a scalar one, and fail on one that layers share.
    zeros = to.constant(f"{linear.name}.zeros", np.zeros(linear.shape[1], zero.dtype))
    unrounded = to.node("DequantizeLinear", stored, scales, zeros, axis=1)
    # ONNX Runtime fuses a two-dimensional product and an Add into a float Gemm before it looks for quantized
    # products. It does not fuse a Sum.
    flat = linear.nodes[0].op_type == "Gemm" or len(linear.x.shape or ()) == 2
    add = "Sum" if flat and not to.shares else "Add"
    return to.biased(to.node("MatMul", to.quantized(linear.x, scale, zero), unrounded), bias, add)


def _int8_dynamic(to: Builder, linear: Linear, weight: Weight, bias: Bias, scale: float | None) -> ir.Value:
    scales = _scales(to, linear, weight, (linear.shape[1],))
    stored = to.lazy(f"{linear.name}.quantized", ir.DataType.INT8, linear.shape, weight.stored)
    return to.node("DynamicQuantizeMatMul", linear.x, stored, scales, None, bias, domain=MICROSOFT)


def _int4(to: Builder, linear: Linear, weight: Weight, bias: Bias, scale: float | None) -> ir.Value:
    if not to.shares:
        return _in_blocks(to, linear, weight, bias, scale)
    blocks = -(-linear.shape[0] // to.block)
    scales = _scales(to, linear, weight, (blocks, linear.shape[1]))
    stored = to.lazy(
        f"{linear.name}.quantized",
        ir.DataType.INT4,
        linear.shape,
        lambda: weight.stored().astype(ml_dtypes.int4),
    )
    unrounded = to.node("DequantizeLinear", stored, scales, axis=0, block_size=to.block)
    return to.biased(to.node("MatMul", linear.x, unrounded), bias)


def _in_blocks(to: Builder, linear: Linear, weight: Weight, bias: Bias, scale: float | None) -> ir.Value:
    form = weight.form
    assert isinstance(form, Blocks)
    rows, columns = linear.shape
    blocks = -(-rows // form.block)
    scales = to.lazy(
        f"{linear.name}.scales",
        _kind(to.dtype),
        (columns, blocks),
        lambda: np.ascontiguousarray(weight.scales().T),
    )
    packed = to.lazy(
        f"{linear.name}.quantized",
        ir.DataType.UINT8,
        (columns, blocks, form.block * form.bits // 8),
        lambda: pack(weight.stored(), form),
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
        bits=form.bits,
        block_size=form.block,
        accuracy_level=4,  # rounds activations to int8 in blocks, so that the arithmetic is in integers
    )


FORMS: dict[str, Form] = {
    "int8": _int8,
    "int8-dynamic": _int8_dynamic,
    "int8-weights": _in_blocks,
    "fp8": _fp8,
    "int4": _int4,
}
"""By precision, the function that adds the nodes of a quantized linear layer and returns its output.

Its arguments are the builder, the layer, its weight, its bias and the scale of its activation, which is None
for precisions without a fixed one."""


def pack(stored: NDArray[Any], form: Blocks) -> NDArray[np.uint8]:
    """Pack integers [K, N] as `MatMulNBits` reads them: [N, K / block, block * bits / 8] uint8.

    Half of the range is added to each number, so that none is negative. Of 4 bits, each byte holds two
    numbers, the first in its low bits.
    """
    rows, columns = stored.shape
    half = 1 << (form.bits - 1)
    padded = np.pad(stored.astype(np.int16) + half, ((0, -rows % form.block), (0, 0)), constant_values=half)
    blocks = padded.T.astype(np.uint8).reshape(columns, -1, form.block)
    if form.bits == 8:
        return np.ascontiguousarray(blocks)
    return np.ascontiguousarray(blocks[..., ::2] | (blocks[..., 1::2] << 4))


def _scales(to: Builder, linear: Linear, weight: Weight, shape: tuple[int, ...]) -> ir.Value:
    return to.lazy(f"{linear.name}.scales", _kind(to.dtype), shape, weight.scales)


def _kind(dtype: np.dtype) -> ir.DataType:
    return ir.DataType.from_numpy(dtype)
