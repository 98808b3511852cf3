"""Graphs that are opened in threads."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

import visprune
from visprune.bundle import Bundle
from visprune.errors import BundleError
from visprune.runtime.backends import graph_opener, opening
from visprune.runtime.backends.runner import BackendOptions, to_numpy

WAIT = 20  # seconds; a test that waits so long fails


@pytest.fixture
def opened(tiny_bundle):
    """Opens a graph of the bundle, and the runners that it has opened."""
    open_graph = graph_opener(Bundle.open(tiny_bundle), BackendOptions("cpu", 1))
    runners = {}

    def record(graph):
        runners[graph] = open_graph(graph)
        return runners[graph]

    record.runners = runners
    return record


@pytest.fixture
def broken(tiny_copy):
    """A function that damages graphs of a bundle, so that its manifest does not show it."""

    def damage(*graphs):
        file = tiny_copy / "visprune.json"
        data = json.loads(file.read_text())
        for graph in graphs:
            path = tiny_copy / "onnx" / f"{graph}.onnx"
            path.write_bytes(b"no graph")
            data["files"][f"onnx/{graph}.onnx"]["size"] = path.stat().st_size
        file.write_text(json.dumps(data))
        return tiny_copy

    return damage


def is_open(runner):
    return runner._session is not None


def test_a_runner_is_used_while_another_is_being_opened(opened):
    go = threading.Event()

    def open_graph(graph):
        assert graph == "embedding" or go.wait(WAIT)
        return opened(graph)

    graphs = opening.begin_to_open(open_graph, ["vision_encoder", "embedding"], 2)
    ids = {"input_ids": np.array([[5]]), "image_features": np.zeros((0, 8), np.float32)}
    assert to_numpy(graphs["embedding"].infer(ids)["inputs_embeds"]).shape == (1, 1, 8)
    assert not graphs["vision_encoder"].over
    go.set()
    assert graphs["vision_encoder"].specs == opened.runners["vision_encoder"].specs
    for one in graphs.values():
        with one:
            assert one.over
    assert not any(map(is_open, opened.runners.values()))


def test_one_that_waits_for_its_turn_is_not_opened_after_it_was_closed(opened):
    go, begun = threading.Event(), threading.Event()

    def open_graph(graph):
        begun.set()
        assert go.wait(WAIT)
        return opened(graph)

    graphs = opening.begin_to_open(open_graph, ["embedding", "vision_encoder"], 1)
    assert begun.wait(WAIT)
    graphs["vision_encoder"].__exit__(None, None, None)
    go.set()
    graphs["embedding"].__exit__(None, None, None)
    assert list(opened.runners) == ["embedding"]
    assert not is_open(opened.runners["embedding"])


def test_the_error_is_that_of_the_first_graph_and_the_others_are_closed(broken, monkeypatch):
    made = []
    real = opening.begin_to_open

    def begin(*args):
        made.append(real(*args))
        return made[0]

    monkeypatch.setattr("visprune.runtime.loading.begin_to_open", begin)
    for _ in range(3):  # whichever thread is first
        made.clear()
        with pytest.raises(BundleError, match="cannot load the graph 'embedding'"):
            visprune.load(broken("embedding", "decoder_model_merged"), verify=False, threads=4)
        whole = ("vision_encoder", "token_pruner")
        assert not any(is_open(made[0][graph].wait()) for graph in whole)


def test_without_waiting_the_error_comes_when_the_graph_is_used(broken, picture):
    pipeline = visprune.load(broken("decoder_model_merged"), verify=False, wait=False)
    with pipeline, pytest.raises(BundleError, match="cannot load the graph 'decoder_model_merged'"):
        pipeline.generate(picture(0), "q")


def test_the_wait_has_a_time_of_its_own(tiny_bundle, picture, monkeypatch):
    go = threading.Event()

    def slow(bundle, options):
        open_graph = graph_opener(bundle, options)
        return lambda graph: (go.wait(WAIT), open_graph(graph))[1]

    monkeypatch.setattr("visprune.runtime.loading.graph_opener", slow)
    with visprune.load(tiny_bundle, wait=False) as pipeline, visprune.load(tiny_bundle, wait=False) as other:
        threading.Timer(0.05, go.set).start()
        answer = pipeline.generate(picture(0), "q", max_new_tokens=2)
        assert answer.timings_ms["opening"] > 0
        assert answer.token_ids == other.generate(picture(0), "q", max_new_tokens=2).token_ids
        assert "opening" not in pipeline.generate(picture(0), "q", max_new_tokens=2).timings_ms
