"""Ranges of activations, compared with those of ONNX Runtime's calibrators."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")

from visprune.quantize.numerics import Int8, relative_error
from visprune.quantize.ranges import RANGES, candidates, entropy_range

rng = np.random.default_rng(0)
SHAPE = (512, 1024)
OUTLIERS = rng.standard_normal(SHAPE).astype(np.float32)
OUTLIERS[5, 7], OUTLIERS[40, 200] = 40.0, -35.0
ROWS = {
    "normal": rng.standard_normal(SHAPE).astype(np.float32),
    "heavy tails": rng.standard_t(3, SHAPE).astype(np.float32),
    "one-sided": np.abs(rng.standard_normal(SHAPE)).astype(np.float32) ** 2,
    "outliers": OUTLIERS,
}


def theirs(method, rows, bins, **settings):
    """Return the range that ONNX Runtime's collector of histograms finds."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    options = {"num_quantized_bins": 255, "percentile": 99.99, "scenario": "same"} | settings
    collector = calibrate.HistogramCollector(method=method, symmetric=True, num_bins=bins, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": rows})
        return float(collector.compute_collection_result()["x"][1])


@pytest.mark.parametrize("case", ROWS)
def test_percentiles_are_those_of_onnx_runtime(case):
    rows = ROWS[case]
    amax = float(np.abs(rows).max())
    (found,) = candidates("percentile", rows, amax)
    assert found == pytest.approx(theirs("percentile", rows, bins=8192), rel=0.01)


@pytest.mark.parametrize("case", ROWS)
def test_entropy_is_near_that_of_onnx_runtime(case):
    """Both search for the least divergence, which is flat there, and smooth empty bins in different ways."""
    rows = ROWS[case]
    amax = float(np.abs(rows).max())
    found = entropy_range(np.abs(rows), amax, bins=512)
    expected = theirs("entropy", np.concatenate([rows, -rows]), bins=1025)
    assert found == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("kind", RANGES)
def test_no_range_is_wider_than_what_there_was(case, kind):
    rows = ROWS[case]
    amax = float(np.abs(rows).max()) * 1.5  # the largest magnitude is not in the sampled rows
    found = candidates(kind, rows, amax)
    assert found == sorted(set(found), reverse=True)
    assert all(0.0 < width <= amax for width in found)
    assert (amax in found) == (kind in ("max", "search"))


def test_search_has_all_others():
    rows = ROWS["heavy tails"]
    amax = float(np.abs(rows).max())
    others = {width for kind in ("max", "percentile", "entropy") for width in candidates(kind, rows, amax)}
    assert others < set(candidates("search", rows, amax))


@pytest.mark.parametrize("kind", RANGES)
def test_hardly_any_values(kind):
    zeros = np.zeros((4, 8), np.float32)
    assert candidates(kind, zeros, 2.0) == [2.0]  # only tokens that were not sampled are not zero
    zeros[1, 1] = -0.5
    assert all(0.0 < width <= 2.0 for width in candidates(kind, zeros, 2.0))
    tiny = np.full((1, 1), 1e-30, np.float32)
    assert all(0.0 < width <= 1.1e-30 for width in candidates(kind, tiny, 1e-30))


def test_entropy_cuts_outliers_off_and_keeps_a_uniform_range():
    amax = float(np.abs(OUTLIERS).max())
    cut = entropy_range(np.abs(OUTLIERS), amax)
    assert cut < amax / 4
    uniform = np.linspace(0.0, 1.0, 100_000, dtype=np.float32)
    assert entropy_range(uniform, 1.0) > 0.9


def test_clipping_to_the_entropy_range_is_finer_for_most_tokens():
    amax = float(np.abs(OUTLIERS).max())
    cut = entropy_range(np.abs(OUTLIERS), amax)
    calm = np.delete(OUTLIERS, (5, 40), axis=0)
    whole, clipped = (relative_error(calm, Int8().activation(calm, width / 127)) for width in (amax, cut))
    assert clipped < whole / 2
