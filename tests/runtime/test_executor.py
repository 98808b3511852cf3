"""The executor on runners that are plain functions."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from visprune.errors import BundleError
from visprune.manifest import Graph, Stage, TensorSpec
from visprune.runtime.backends.runner import Specs
from visprune.runtime.executor import Executor


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
    Stage("see", "image", {"x": "pixels"}, {"y": "features"}),
    Stage("join", "always", {"ids": "ids", "seen": "features"}, {"z": "out"}),
)


def make():
    return {
        "see": FakeRunner(lambda x: {"y": np.ones((len(x), 3), np.float32)}),
        "join": FakeRunner(lambda ids, seen: {"z": np.array([len(seen)], np.float32)}),
    }


def test_runs_stages_in_order_and_times_them():
    done = Executor(STAGES, GRAPHS, make(), ["out"]).run(
        {"ids": np.arange(3)}, [{"pixels": np.zeros((2, 2), np.float32)}]
    )
    assert done.values == {"out": np.array([2.0])}
    assert list(done.timings_ms) == ["see", "join"]


def test_values_of_skipped_stages_are_empty():
    runners = make()
    done = Executor(STAGES, GRAPHS, runners, ["out", "features"]).run({"ids": np.arange(3)})
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
    Executor(STAGES[:1], graphs, runners, []).run({}, [{"pixels": np.zeros((1, 2), np.float32)}])
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
    supplied, images = {"ids": np.arange(1)}, [{"pixels": np.zeros((1, 2), np.float32)}]
    Executor(stages, graphs, runners, ["end"]).run(supplied, images)
    assert alive == [False]
    # A wanted value stays.
    alive.clear()
    made.clear()
    Executor(stages, graphs, runners, ["end", "features"]).run(supplied, images)
    assert alive == [True]


def test_each_image_runs_alone_and_joins_the_others():
    runners = make()
    images = [{"pixels": np.zeros((count, 2), np.float32)} for count in (1, 3)]
    done = Executor(STAGES, GRAPHS, runners, ["out", "features"]).run({"ids": np.arange(3)}, images)
    assert runners["see"].calls == [{"x": ("float32", (1, 2))}, {"x": ("float32", (3, 2))}]
    assert [image["features"].shape for image in done.images] == [(1, 3), (3, 3)]
    assert done.values["out"] == [4.0]
    assert list(done.timings_ms) == ["see", "join"]


def test_images_come_first():
    late = Stage("see", "image", {"x": "pixels"}, {"y": "again"})
    with pytest.raises(BundleError, match="single images"):
        Executor((*STAGES, late), GRAPHS, make(), ["out"])


def test_reading_before_assigning_is_refused():
    with pytest.raises(BundleError, match="before it is assigned"):
        Executor(STAGES[::-1], GRAPHS, make(), ["out"])


class TestBypass:
    """A stage that does not run hands on what it was given."""

    GRAPHS = GRAPHS | {
        "prune": Graph(
            "",
            None,
            (spec("h", 1, "S", 3), spec("score", 1, "S"), spec("count", dtype="int64")),
            (spec("kept", 1, "kept", 3), spec("indices", 1, "kept", dtype="int64")),
        ),
        "last": Graph("", None, (spec("h", 1, "S", 3),), (spec("z", "S"),)),
    }
    STAGES = (
        Stage(
            "prune",
            "visual",
            {"h": "h.0", "score": "score.0", "count": "count.0"},
            {"kept": "h.1", "indices": "indices.0"},
            {"h.1": "h.0"},
        ),
        Stage(
            "prune",
            "visual",
            {"h": "h.1", "score": "score.1", "count": "count.1"},
            {"kept": "h.2", "indices": "indices.1"},
            {"h.2": "h.1"},
        ),
        Stage("last", "always", {"h": "h.2"}, {"z": "out"}),
    )

    def make(self, wanted=("out", "indices.0", "indices.1")):
        runners = {
            "prune": FakeRunner(
                lambda h, score, count: {"kept": h[:, : int(count)], "indices": np.arange(int(count))[None]}
            ),
            "last": FakeRunner(lambda h: {"z": h[0, :, 0]}),
        }
        return Executor(self.STAGES, self.GRAPHS, runners, wanted), runners

    def supplied(self):
        hidden = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
        scores = {f"score.{k}": np.zeros((1, 4 - k), np.float32) for k in (0, 1)}
        return {"h.0": hidden, "count.0": np.array(3), "count.1": np.array(2)} | scores

    def test_values_go_through_a_chain_of_stages_that_do_not_run(self):
        executor, runners = self.make()
        supplied = self.supplied()
        done = executor.run(supplied)
        np.testing.assert_array_equal(done.values["out"], supplied["h.0"][0, :, 0])
        assert set(done.values) == {"out"}  # no indices: nothing was chosen
        assert not runners["prune"].calls
        assert list(done.timings_ms) == ["last"]

    def test_stages_that_run_are_not_bypassed(self):
        executor, runners = self.make()
        done = executor.run(self.supplied(), [{}])
        np.testing.assert_array_equal(done.values["out"], [0.0, 3.0])
        np.testing.assert_array_equal(done.values["indices.0"], [[0, 1, 2]])
        assert len(runners["prune"].calls) == 2
        assert list(done.timings_ms) == ["prune", "last"]  # one figure for a graph that runs twice

    def test_what_the_bypass_names_may_be_missing_itself(self):
        executor, _ = self.make()
        supplied = self.supplied()
        del supplied["h.0"]
        assert executor.run(supplied).values["out"].shape == (0,)
