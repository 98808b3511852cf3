"""The executor on runners that are plain functions."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from visprune.bundle import Graph, Stage, TensorSpec
from visprune.errors import BundleError
from visprune.runtime.executor import Executor
from visprune.runtime.runner import Specs


class FakeRunner:
    """Computes with a function of named arrays; remembers what it was fed."""

    def __init__(self, compute):
        self.compute = compute
        self.calls = []
        self.specs = Specs((), ())

    def infer(self, feeds):
        self.calls.append({name: (value.dtype.name, value.shape) for name, value in feeds.items()})
        return self.compute(**feeds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def spec(name, *shape, dtype="float32"):
    return TensorSpec(name, dtype, shape)


GRAPHS = {
    "see": Graph("", None, (spec("x", "T", 2),), (spec("y", "M", 3),)),
    "join": Graph("", None, (spec("ids", "S", dtype="int64"), spec("seen", "M", 3)), (spec("z", "S"),)),
}
STAGES = (
    Stage("see", "visual", {"x": "pixels"}, {"y": "features"}),
    Stage("join", "always", {"ids": "ids", "seen": "features"}, {"z": "out"}),
)


def make():
    return {
        "see": FakeRunner(lambda x: {"y": np.ones((len(x), 3), np.float32)}),
        "join": FakeRunner(lambda ids, seen: {"z": np.array([len(seen)], np.float32)}),
    }


def test_runs_stages_in_order_and_times_them():
    done = Executor(STAGES, GRAPHS, make(), ["out"]).run(
        {"pixels": np.zeros((2, 2), np.float32), "ids": np.arange(3)}, visual=True
    )
    assert done.values == {"out": np.array([2.0])}
    assert list(done.timings_ms) == ["see", "join"]


def test_values_of_skipped_stages_are_empty():
    runners = make()
    done = Executor(STAGES, GRAPHS, runners, ["out", "features"]).run({"ids": np.arange(3)}, visual=False)
    assert runners["join"].calls == [{"ids": ("int64", (3,)), "seen": ("float32", (0, 3))}]
    assert set(done.values) == {"out"}
    assert list(done.timings_ms) == ["join"]


def test_inputs_are_what_no_stage_assigns():
    executor = Executor(STAGES, GRAPHS, make(), ["out", "nothing gives this"])
    assert set(executor.inputs) == {"pixels", "ids"}
    assert executor.outputs == {"out"}


def test_floats_of_the_host_take_the_width_of_the_graph():
    graphs = {"see": Graph("", None, (spec("x", "T", 2, dtype="float16"),), (spec("y", "M", 3),))}
    runners = make()
    Executor(STAGES[:1], graphs, runners, []).run({"pixels": np.zeros((1, 2), np.float32)}, visual=True)
    assert runners["see"].calls == [{"x": ("float16", (1, 2))}]


def test_a_value_is_freed_after_its_last_reader():
    class Tracked(np.ndarray):
        pass

    made = []

    def see(x):
        value = np.zeros((1, 3), np.float32).view(Tracked)
        made.append(weakref.ref(value))
        return {"y": value}

    alive = []
    runners = make() | {
        "see": FakeRunner(see),
        "late": FakeRunner(lambda a: alive.append(made[0]() is not None) or {"b": a}),
    }
    graphs = GRAPHS | {"late": Graph("", None, (spec("a", "S"),), (spec("b", "S"),))}
    stages = (*STAGES, Stage("late", "always", {"a": "out"}, {"b": "end"}))
    supplied = {"pixels": np.zeros((1, 2), np.float32), "ids": np.arange(1)}
    Executor(stages, graphs, runners, ["end"]).run(supplied, visual=True)
    assert alive == [False]
    # A wanted value stays.
    alive.clear()
    made.clear()
    Executor(stages, graphs, runners, ["end", "features"]).run(supplied, visual=True)
    assert alive == [True]


def test_reading_before_assigning_is_refused():
    with pytest.raises(BundleError, match="before it is assigned"):
        Executor(STAGES[::-1], GRAPHS, make(), ["out"])
