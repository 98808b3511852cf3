"""Rounding to few bits, compared with independent implementations of the formats."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")

from visprune.quantize.forms import number_format
from visprune.quantize.numerics import Blocks, Fp8, Int8, fake_weight, positive, relative_error

PRECISIONS = ("int8", "int8-weights", "fp8", "int4")
FLOATS = (np.dtype(np.float32), np.dtype(np.float16))
FINEST = {"int8": 0.5 / 127, "int8-weights": 0.5 / 127, "fp8": 1 / 16, "int4": 0.5 / 7}


def e4m3(code):
    """Return the value of an E4M3 code (no infinities): sign, 4 exponent bits (bias 7), 3 mantissa bits."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return np.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


CODES = np.array([e4m3(code) for code in range(256)])
GRID = np.sort(CODES[np.isfinite(CODES) & (np.signbit(CODES) == 0)])  # [127], its order is the code


def nearest_e4m3(x):
    """Return the nearest of all values; of two equally near, the one with an even code."""
    size = np.minimum(np.abs(x.astype(np.float64)), GRID[-1])
    distance = np.abs(size[..., None] - GRID)
    closest = distance.min(axis=-1, keepdims=True)
    even = np.arange(len(GRID)) % 2 == 0
    first = np.where(distance == closest, np.where(even, 0, 1), 2).argmin(axis=-1)
    return np.copysign(GRID[first], x)


def drawn(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1:]))).astype(np.float32)


def test_e4m3_has_the_values_of_all_256_codes():
    import ml_dtypes

    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(theirs, CODES)
    assert Fp8().largest == GRID[-1] == 448.0


def test_fp8_rounds_to_the_nearest_code_and_ties_to_even():
    halves = (GRID[1:] + GRID[:-1]) / 2
    x = np.concatenate([GRID, halves, halves * (1 + 1e-6), halves * (1 - 1e-6), [449.0, 1e6, 0.0]])
    x = np.concatenate([x, -x]).astype(np.float32)
    np.testing.assert_array_equal(Fp8().activation(x, 1.0), nearest_e4m3(x))
    wide = drawn((64, 32))
    np.testing.assert_array_equal(
        Fp8().activation(wide, 0.25), nearest_e4m3(wide / np.float32(0.25)).astype(np.float32) * 0.25
    )


def test_int8_rounds_to_the_nearest_integer_and_ties_to_even():
    x = np.array([0.0, 0.5, 1.5, -0.5, -1.5, 2.49, 126.6, 300.0, -127.6, -300.0], np.float32)
    expected = np.array([0, 0, 2, 0, -2, 2, 127, 127, -128, -128], np.float32)
    np.testing.assert_array_equal(Int8().activation(x, 1.0), expected)
    np.testing.assert_array_equal(Int8().activation(x / 8, 0.125), expected / 8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_weights(dtype):
    weight = drawn((48, 7))
    stored = Int8().round_weight(weight, Int8().weight_scales(weight, dtype))
    assert stored.dtype == np.int8
    assert stored.min() >= -127
    for column in range(7):  # one output channel at a time
        scale = dtype.type(max(abs(v) for v in weight[:, column]) / 127)
        for k in range(48):
            expected = max(-127, min(127, round(float(weight[k, column] / np.float32(scale)))))
            assert stored[k, column] == expected
    assert (np.abs(stored).max(axis=0) == 127).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8_weights(dtype):
    weight = drawn((48, 7))
    scales = (np.abs(weight).max(axis=0) / 448).astype(dtype)
    expected = nearest_e4m3(weight / scales.astype(np.float32)).astype(np.float32) * scales.astype(np.float32)
    np.testing.assert_array_equal(fake_weight(Fp8(), weight, dtype), expected)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("rows", [32, 128, 200])
def test_int4_weights_have_a_scale_for_each_block(rows, block):
    form, dtype = Blocks(4, block), np.dtype(np.float32)
    weight = drawn((rows, 5))
    scales = form.weight_scales(weight, dtype)
    stored = form.round_weight(weight, scales)
    assert scales.shape == (-(-rows // block), 5)
    assert stored.shape == weight.shape
    assert stored.min() >= -8
    assert stored.max() <= 7
    for index in range(len(scales)):
        part = weight[index * block : (index + 1) * block]
        numbers = stored[index * block : (index + 1) * block]
        np.testing.assert_array_equal(numbers, np.clip(np.rint(part / scales[index]), -8, 7))
        plain = np.abs(part).max(axis=0) / 7  # rounding to nearest without clipping
        error = np.square(numbers * scales[index] - part).sum(axis=0)
        unclipped = np.square(np.clip(np.rint(part / plain), -8, 7) * plain - part).sum(axis=0)
        assert (error <= unclipped * (1 + 1e-5)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_holds_for_every_format(precision, dtype):
    form = number_format(precision, 32)
    weight = drawn((96, 12))
    weight[:, 3] = 0.0
    weight[:32, 4] = 0.0
    weight[:, 5] = 1e-30
    scales = form.weight_scales(weight, dtype)
    assert scales.dtype == dtype
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    rounded = fake_weight(form, weight, dtype)
    assert np.isfinite(rounded).all()
    assert not rounded[:, 3].any()
    assert not rounded[:32, 4].any()
    widest = np.abs(weight).max(axis=0)
    shrunk = 0.2 if precision == "int4" else 1e-3  # int4 may clip its largest weights
    most = np.maximum(FINEST[precision], shrunk) * widest * 1.01 + 1e-7
    assert (np.abs(rounded - weight).max(axis=0) <= most).all()
    assert (rounded * weight >= 0).all()  # no sign changes
    np.testing.assert_allclose(fake_weight(form, -weight, dtype)[:, 0], -rounded[:, 0], rtol=0.3, atol=0.3)


def test_a_weight_on_the_grid_is_stored_exactly():
    rng = np.random.default_rng(1)
    integers = rng.integers(-7, 8, (64, 6)).astype(np.float32)
    integers[0] = integers[32] = 7
    dtype = np.dtype(np.float32)
    np.testing.assert_allclose(fake_weight(Blocks(4, 32), integers * 0.5, dtype), integers * 0.5, rtol=1e-6)
    integers[0] = 127
    np.testing.assert_allclose(fake_weight(Int8(), integers * 0.5, dtype), integers * 0.5, rtol=1e-6)
    codes = GRID[rng.integers(0, len(GRID), (64, 6))].astype(np.float32)
    codes[0] = 448
    np.testing.assert_array_equal(fake_weight(Fp8(), codes, dtype), codes)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scales_are_never_zero(dtype):
    found = positive(np.array([0.0, 1e-45, 1e-12, 1.0], np.float32), dtype)
    assert found.dtype == dtype
    assert (found > 0).all()
    assert found[-1] == 1.0


def test_relative_error_counts_every_token_alike():
    exact = np.array([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]], np.float32)
    rounded = exact + np.array([[0.0, 1.0], [0.0, 0.0], [0.5, 0.0]], np.float32)
    assert relative_error(exact, exact) == 0.0
    assert relative_error(exact, rounded) == pytest.approx(np.sqrt(0.2**2 / 2))  # rows of zeros do not count
    assert relative_error(exact[2:], rounded[2:]) == 0.0
