"""As few layers are left float as the error budget of a graph requires."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx_ir")

from visprune.quantize import quantize
from visprune.quantize.layer_choices import GraphChoices, LayerChoice
from visprune.quantize.search import NOTE, leave_out


def plan_of(errors, precision="int8"):
    return GraphChoices({f"l{i}": LayerChoice(precision, 0.1, error) for i, error in enumerate(errors)})


class Attempts:
    """Pretends to write a graph: its error is the sum of those of the layers that are quantized."""

    def __init__(self, rest=0.0):
        self.rest, self.plans = rest, []

    def __call__(self, plan):
        self.plans.append(plan)
        return self.rest + sum(layer.error for layer in plan.layers.values() if layer.precision != "float")


def left(plan):
    return sorted(name for name, layer in plan.layers.items() if layer.precision == "float")


ERRORS = [0.01, 0.5, 0.02, 0.3, 0.04, 0.05, 0.2, 0.06]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (2.0, []),
        (0.7, ["l1"]),
        (0.6, ["l1", "l3"]),
        (0.2, ["l1", "l3", "l6"]),
        (0.13, ["l1", "l3", "l6", "l7"]),
        (0.075, ["l1", "l3", "l5", "l6", "l7"]),
        (0.031, ["l1", "l3", "l4", "l5", "l6", "l7"]),
        (0.011, ["l1", "l2", "l3", "l4", "l5", "l6", "l7"]),
        (0.001, [f"l{i}" for i in range(8)]),
    ],
)
def test_the_fewest_that_fit(budget, expected):
    attempt = Attempts()
    found = leave_out(plan_of(ERRORS), attempt, budget)
    assert left(found) == expected
    assert found.layers == attempt.plans[-1].layers  # so they are on disk
    assert all(found.layers[name].note == NOTE and found.layers[name].scale is None for name in expected)
    assert len(attempt.plans) <= 1 + 4 + 3 + 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_a_budget_that_nothing_meets_leaves_all(count):
    attempt = Attempts(rest=1.0)
    found = leave_out(plan_of([0.1] * count), attempt, 0.5)
    assert len(left(found)) == count
    assert found.layers == attempt.plans[-1].layers


@pytest.mark.parametrize("precision", ["int4", "int8-dynamic"])
def test_layers_whose_activations_have_no_range_are_never_left_out(precision):
    attempt = Attempts(rest=1.0)
    assert left(leave_out(plan_of([0.1, 0.2], precision), attempt, 0.01)) == []
    assert len(attempt.plans) == 1


def test_without_samples_everything_stays():
    attempts = []
    assert left(leave_out(plan_of(ERRORS), attempts.append, 1e-9)) == []
    assert len(attempts) == 1


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_bundle_within_its_budget(precision, tiny, tmp_path, jsonl, report):
    lines, options = jsonl(), {"precision": precision, "timing": False}
    loose = quantize(tiny, tmp_path / "loose", calibration=lines, error_budget=float("inf"), **options)
    assert loose.manifest.quantization.kept_float == ()
    whole = {error.graph: error.relative_l2 for error in loose.manifest.quantization.errors}
    budget = whole["decoder_model_merged"] * 0.6
    some = quantize(tiny, tmp_path / "some", calibration=lines, error_budget=budget, **options)
    told = some.manifest.quantization
    assert all(error.relative_l2 <= budget for error in told.errors)
    decoder = [layer for layer in report(some)["layers"] if layer["graph"] == "decoder_model_merged"]
    noted = [layer for layer in decoder if layer["note"]]
    assert 0 < len(noted) < len(decoder)
    assert {layer["layer"] for layer in noted} <= set(told.kept_float)
    assert {layer["precision"] for layer in noted} == {"float"}
    # The layers left float are those with the largest errors of their own.
    quantized = [layer["own_error"] for layer in decoder if not layer["note"]]
    assert min(layer["own_error"] for layer in noted) >= max(quantized)


def test_no_error_allowed_leaves_every_layer_float(tiny, tmp_path, jsonl, report):
    made = quantize(
        tiny, tmp_path / "made", precision="int8", calibration=jsonl(), error_budget=1e-12, timing=False
    )
    said = report(made)
    assert all(layer["precision"] == "float" and layer["note"] for layer in said["layers"])
    assert sorted(made.manifest.quantization.kept_float) == sorted(layer["layer"] for layer in said["layers"])
    assert all(error.relative_l2 < 1e-6 for error in made.manifest.quantization.errors)
    assert said["answers"]["same"] == said["answers"]["samples"] > 0
