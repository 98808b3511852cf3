"""ONNX Runtime computes each form as a fake-quantized forward pass in NumPy does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from small_graphs import drawn, ir, model, node, onnx, operators, planned, run, settings, write

from visprune.quantize.forms import pack
from visprune.quantize.numerics import Blocks

K, N, ROWS = 64, 24, 5
LARGEST = {"int8": 127, "fp8": 448}
WEIGHTS_ONLY = ("int8-weights", "int4")
# Errors relative to the largest output. For float16, ONNX Runtime multiplies in float32 or in float16.
TOLERANCE = {"float32": 2e-6, "float16": 3e-3}


def signed_int8(x):
    return np.clip(np.rint(x), -128, 127)


def e4m3(x):
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def weight_as_stored(weight, precision, dtype, block):
    """Return a weight after rounding, in float32. Its scales have the graph's type."""
    if precision in WEIGHTS_ONLY:
        out = np.empty_like(weight)
        largest, shrinks = (7, (1.0, 0.95, 0.9, 0.85, 0.8)) if precision == "int4" else (127, (1.0,))
        for n in range(weight.shape[1]):
            for k in range(0, len(weight), block):
                part = weight[k : k + block, n]
                tried = []
                for shrink in shrinks:
                    scale = np.float32(dtype.type(np.abs(part).max() * np.float32(shrink / largest)))
                    rounded = np.clip(np.rint(part / scale), -largest - 1, largest) * scale
                    tried.append((float(np.square(rounded - part).sum()), rounded))
                out[k : k + block, n] = min(tried, key=lambda pair: pair[0])[1]
        return out
    largest = LARGEST.get(precision, 127)
    scales = (np.abs(weight).max(axis=0) / largest).astype(dtype).astype(np.float32)
    if precision == "fp8":
        return e4m3(weight / scales) * scales
    return np.clip(np.rint(weight / scales), -127, 127) * scales


def activation_as_seen(x, precision, scale, dtype, block, quotient="float32"):
    """Return an activation after rounding, in float32. `quotient` is the type of x divided by the scale."""
    if precision == "int8-dynamic":  # unsigned, with a zero point, for the whole tensor
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        step = np.float32((high - low) / 255)
        zero = np.rint(-low / step)
        return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    if precision in WEIGHTS_ONLY and block:  # activations are rounded in blocks at accuracy level 4
        out = np.empty_like(x)
        for k in range(0, x.shape[-1], block):
            part = x[..., k : k + block]
            step = np.abs(part).max(axis=-1, keepdims=True) / np.float32(127)
            out[..., k : k + block] = np.rint(part / np.where(step, step, 1)) * step
        return out
    if precision in WEIGHTS_ONLY:
        return x
    step = np.float32(dtype.type(scale))
    divided = (x / step).astype(quotient).astype(np.float32)
    return (signed_int8 if precision == "int8" else e4m3)(divided) * step


def make(dtype, layers, biased):
    """Make a model with layers a, b, ... that read the same activation."""
    nodes, constants = [], {}
    for index, name in enumerate("abc"[:layers]):
        constants[name] = (drawn(K, N, seed=index) / 8).astype(dtype)
        nodes.append(node("MatMul", ["x", name], [f"{name}.p" if biased else f"{name}.y"]))
        if biased:
            constants[f"{name}.bias"] = drawn(N, seed=index, dtype=dtype)
            nodes.append(node("Add", [f"{name}.p", f"{name}.bias"], [f"{name}.y"]))
    outputs = {f"{name}.y": [1, "S", N] for name in "abc"[:layers]}
    return model(nodes, {"x": [1, "S", K]}, outputs, constants, dtype), constants


def check(precision, dtype, folder, *, layers=1, biased=True, shares=False, block=32, optimized=True):
    """Write layers in a precision, run them, compare each with NumPy, and return the path of the graph."""
    block = 128 if precision == "int8-weights" else block
    made, constants = make(dtype, layers, biased)
    x = drawn(1, ROWS, K, dtype=dtype)
    scale = float(np.abs(x).max()) / LARGEST.get(precision, 127) * 0.9  # some values are clipped
    plan = planned(precision, dict.fromkeys("abc"[:layers], scale if precision in LARGEST else None))
    path = write(made, plan, settings(precision, dtype, block), folder, shares)
    onnx.checker.check_model(path)
    outputs = run(path, {"x": x}, optimized)
    kind, seen = np.dtype(dtype), x.astype(np.float32)
    for index, (name, got) in enumerate(zip("abc", outputs, strict=False)):
        own = kind.type(scale)
        for _ in range(0 if shares else index):  # a scale of its own, different in the last bit
            own = np.nextafter(own, kind.type(np.inf))
        weight = weight_as_stored(constants[name].astype(np.float32), precision, kind, block)
        bias = constants[f"{name}.bias"].astype(np.float32) if biased else 0.0
        # Where a processor has no kernel that rounds the activations in blocks, they stay as they are.
        possible = [
            activation_as_seen(seen, precision, own, kind, 0 if shares else block, quotient)
            for quotient in ("float32", dtype)  # ONNX Runtime before 1.32, and since 1.32
        ]
        possible += [seen] if precision in WEIGHTS_ONLY else []
        assert got.dtype == kind
        assert min(distance(got, rounded @ weight + bias) for rounded in possible) < TOLERANCE[dtype]
    return path


def distance(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


CASES = [
    *((precision, "onnxruntime", "float32") for precision in ("int8", "int8-dynamic", "fp8", *WEIGHTS_ONLY)),
    *((precision, "onnxruntime", "float16") for precision in ("int8", "fp8", *WEIGHTS_ONLY)),
    *((precision, "tensorrt", dtype) for precision in ("int8", "fp8", "int4") for dtype in TOLERANCE),
]


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("precision", "reader", "dtype"), CASES)
def test_a_layer_equals_numpy(precision, reader, dtype, layers, biased, tmp_path):
    # The runtime switches off optimizers that take fp8 for int8. TensorRT's int4 would become MatMulNBits.
    path = check(
        precision,
        dtype,
        tmp_path,
        layers=layers,
        biased=biased,
        shares=reader == "tensorrt",
        optimized=precision != "fp8" and (precision, reader) != ("int4", "tensorrt"),
    )
    counts = operators(path)
    if precision in LARGEST:
        assert counts["QuantizeLinear"] == (1 if reader == "tensorrt" else layers)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_form_does_not_depend_on_the_optimizer(precision, tmp_path):
    check(precision, "float32", tmp_path, layers=3, optimized=False)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shares", [False, True], ids=["onnxruntime", "tensorrt"])
def test_blocks(block, shares, tmp_path):
    check("int4", "float32", tmp_path, block=block, shares=shares, optimized=not shares)


@pytest.mark.parametrize("rows", [64, 96, 100])
@pytest.mark.parametrize("block", [32, 64])
def test_packing_is_that_of_the_kernels_own_quantizer(rows, block):
    """The numbers that ONNX Runtime's quantizer chooses, packed by `pack`, are its bytes, but for halves."""
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    blocks = -(-rows // block)
    packed = np.zeros((N, blocks, block // 2), np.uint8)
    scales = np.zeros(N * blocks, np.float32)
    zeros = np.zeros(N * ((blocks + 1) // 2), np.uint8)
    weight = drawn(rows, N)
    state.quantize_matmul_4bits(packed, weight, scales, zeros, block, N, rows, True)
    spread = np.repeat(scales.reshape(N, blocks).T, block, axis=0)[:rows]
    numbers = np.clip(np.rint(weight / spread), -8, 7).astype(np.int8)
    ours = pack(numbers, Blocks(4, block))
    assert ours.shape == packed.shape
    one, other = (unpacked(each)[:, :rows] for each in (ours, packed))
    np.testing.assert_array_equal(one, numbers.T)
    assert np.abs(one - other).max() <= 1  # the runtime's quantizer rounds halves up
    assert (one == other).mean() > 0.99


def unpacked(packed):
    """Unpack bytes [N, blocks, block / 2] to integers [N, K]."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(len(packed), -1).astype(int) - 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [64, 96, 100])
def test_packed_numbers_are_read_as_they_are(rows, bits, tmp_path):
    """With a row of the identity matrix as float activation, the output is the weights."""
    half = 1 << (bits - 1)
    numbers = np.random.default_rng(0).integers(-half, half, (rows, N)).astype(np.int8)
    scales = np.abs(drawn(N, -(-rows // 32))) + 0.1
    product = node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=rows, N=N, bits=bits, block_size=32, accuracy_level=0,
    )  # fmt: skip
    made = model([product], {"x": ["S", rows]}, ["y"], {"w": pack(numbers, Blocks(bits, 32)), "s": scales})
    made.opset_imports["com.microsoft"] = 1
    ir.save(made, tmp_path / "graph.onnx")
    (got,) = run(tmp_path / "graph.onnx", {"x": np.eye(rows, dtype=np.float32)})
    np.testing.assert_allclose(got, numbers * np.repeat(scales.T, 32, axis=0)[:rows], rtol=1e-6)


def test_float16_scales_below_the_smallest_number(tmp_path):
    """An activation of tiny values gets the smallest scale above zero."""
    made, _ = make("float16", 1, biased=False)
    path = write(made, planned("int8", {"a": 1e-12}), settings("int8", "float16"), tmp_path)
    (got,) = run(path, {"x": np.full((1, 2, K), 1e-7, np.float16)})
    assert np.isfinite(got).all()
