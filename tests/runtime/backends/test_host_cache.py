"""A decoder whose cache is written in place gives what the standard graph gives, and costs no copy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from linked import WAYS

from visprune.bundle import Bundle
from visprune.cache_names import PAST, PRESENT
from visprune.runtime import load
from visprune.runtime.backends import onnx_messages, ort_cpu
from visprune.runtime.backends.cache_rewrite import rewrite_cache
from visprune.runtime.backends.host_cache import HostCacheArray, InPlaceRunner, capacity_for
from visprune.runtime.backends.ort import CPU, OrtRunner, open_graph, settings_for
from visprune.runtime.backends.runner import BackendOptions, shape_of, to_numpy
from visprune.runtime.session import Session, cache_capacities, session_values
from visprune.runtime.vision.kept_tokens import keep_for

OPTIONS = BackendOptions("cpu", 1)


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def name(bundle):
    return next(g for g, one in bundle.manifest.graphs.items() if one.inputs[-1].name.startswith(PAST))


@pytest.fixture(scope="module")
def content(bundle, name):
    return bundle.file(bundle.manifest.graphs[name].file).read_bytes()


@pytest.fixture(scope="module")
def in_place(bundle, name):
    with ort_cpu.open_cpu(bundle, name, OPTIONS) as runner:
        yield runner


@pytest.fixture(scope="module")
def standard(bundle, name):
    import onnxruntime

    settings = settings_for(onnxruntime, bundle, name, OPTIONS)
    with open_graph(onnxruntime, bundle, name, settings, [(CPU, {})]) as runner:
        yield runner


class Steps:
    """A conversation with one runner, fed with random embeddings."""

    def __init__(self, runner):
        self.runner = runner
        specs = {spec.name: spec for spec in runner.specs.inputs}
        self.width = specs["inputs_embeds"].shape[2]
        shape = next(spec.shape for name, spec in specs.items() if name.startswith(PAST))
        self.empty = np.zeros((1, shape[1], 0, shape[3]), np.float32)
        self.past = {name: self.empty for name in specs if name.startswith(PAST)}

    @property
    def length(self):
        return shape_of(next(iter(self.past.values())))[2]

    def feed(self, count, seed=0):
        embeds = np.random.default_rng(seed).normal(size=(1, count, self.width)).astype(np.float32)
        positions = np.arange(self.length, self.length + count)[None]
        done = self.runner.infer({"inputs_embeds": embeds, "position_ids": positions, **self.past})
        self.past = {name: done[name.replace(PAST, PRESENT)] for name in self.past}
        return to_numpy(done["logits"])


def test_the_graph_on_disk_is_standard_and_the_loaded_one_is_not(content, in_place, standard):
    assert b"GroupQueryAttention" not in content
    assert type(in_place) is InPlaceRunner
    assert in_place.specs == standard.specs


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_bundle_whose_files_are_links(way, demo_bundle, name, tmp_path):
    with ort_cpu.open_cpu(Bundle.open(way(demo_bundle, tmp_path)), name, OPTIONS) as runner:
        assert type(runner) is InPlaceRunner


def test_the_largest_weight_comes_first(content, bundle, name):
    file = bundle.file(bundle.manifest.graphs[name].data).name
    graph = onnx_messages.parse(rewrite_cache(content, (file, file))).graph
    entries = {one.name: {e.key: e.value for e in one.external_data} for one in graph.initializer}
    sizes = {name: int(entry.get("length", 0)) for name, entry in entries.items()}
    read = [max((sizes.get(name, 0) for name in node.input), default=0) for node in graph.node]
    assert read[0] == max(sizes.values()) > 0
    made = [tuple(node.output) for node in graph.node]
    before = [tuple(node.output) for node in onnx_messages.parse(content).graph.node]
    assert made[0] != before[0]
    assert made[1:] == [one for one in before if one in made and one != made[0]]  # those of the mask are gone


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_standard_graph_of_a_bundle_whose_files_are_links(
    way, demo_bundle, name, tmp_path, standard, monkeypatch
):
    monkeypatch.setitem(sys.modules, "google.protobuf.message", None)  # then nothing is rewritten
    with ort_cpu.open_cpu(Bundle.open(way(demo_bundle, tmp_path)), name, OPTIONS) as runner:
        assert type(runner) is OrtRunner
        np.testing.assert_allclose(Steps(runner).feed(3), Steps(standard).feed(3), rtol=1e-6, atol=1e-6)


def test_logits_and_cache_are_those_of_the_standard_graph(in_place, standard):
    ours, theirs = Steps(in_place), Steps(standard)
    counts = [5, 1, 1, 3, *[1] * 3, capacity_for(10), 1]  # the last but one needs larger buffers
    for seed, count in enumerate(counts):
        np.testing.assert_allclose(ours.feed(count, seed), theirs.feed(count, seed), rtol=1e-4, atol=1e-4)
    assert ours.length == sum(counts)
    for name, value in ours.past.items():
        np.testing.assert_allclose(value.numpy(), to_numpy(theirs.past[name]), rtol=1e-4, atol=1e-4)


def test_a_step_writes_into_the_same_buffer_until_it_is_full(in_place):
    steps = Steps(in_place)
    steps.feed(4)
    first = next(iter(steps.past.values()))
    room = capacity_for(4)
    assert first.buffers.capacity == room
    assert first.nbytes == first.numpy().nbytes // 4 * room
    for _ in range(room - 4):
        steps.feed(1)
    assert {value.buffers for value in steps.past.values()} == {first.buffers}
    steps.feed(1)
    assert first.buffers not in {value.buffers for value in steps.past.values()}


def test_a_shorter_past_is_continued_in_the_same_buffer(in_place, standard):
    ours, theirs = Steps(in_place), Steps(standard)
    ours.feed(6, seed=1)
    ours.feed(3, seed=2)
    ours.past = {name: value.cropped(6) for name, value in ours.past.items()}
    theirs.feed(6, seed=1)
    np.testing.assert_allclose(ours.feed(2, seed=3), theirs.feed(2, seed=3), rtol=1e-4, atol=1e-4)


def test_conversations_that_take_turns(in_place, standard):
    one, other, alone = Steps(in_place), Steps(in_place), Steps(standard)
    one.feed(3, seed=1)
    other.feed(5, seed=2)
    one.feed(1, seed=3)
    logits = other.feed(1, seed=4)
    alone.feed(5, seed=2)
    np.testing.assert_allclose(logits, alone.feed(1, seed=4), rtol=1e-4, atol=1e-4)


def test_two_sessions_continue_one(bundle):
    def session(pipeline):
        runners = pipeline.loaded.executor._runners
        capacities = cache_capacities(pipeline.manifest, runners)
        assert "logits" in session_values(pipeline.manifest)
        return Session(pipeline.loaded.executor, pipeline.manifest, keep_for(pipeline.manifest), capacities)

    with load(bundle.path, threads=1) as pipeline:
        first = session(pipeline)
        first.prefill([5, 6, 7, 8], [])
        assert first.shareable
        second = first.fork()
        mine, theirs = first.decode(9), second.decode(10)
        fresh = session(pipeline)
        fresh.prefill([5, 6, 7, 8, 10], [])
        again = fresh.decode(11)
        np.testing.assert_allclose(second.decode(11), again, rtol=1e-4, atol=1e-4)
        assert not np.allclose(mine, theirs)
        assert all(isinstance(value, HostCacheArray) for value in first._cache.feeds().values())


class TestLeftAlone:
    def changed(self, content, change):
        model = onnx_messages.parse(content)
        change(model.graph)
        return rewrite_cache(model.SerializeToString())

    def attention(self, graph):
        return next(node for node in graph.node if node.op_type == "Attention")

    def test_what_is_no_model(self):
        assert rewrite_cache(b"no graph") is None

    def test_a_graph_without_a_cache(self, bundle):
        assert rewrite_cache(bundle.file(bundle.manifest.graphs["embedding"].file).read_bytes()) is None

    def test_an_attention_that_does_more(self, content):
        def cap(graph):
            onnx_messages.attribute(self.attention(graph), "softcap", 30.0)

        assert self.changed(content, cap) is None

    def test_another_mask(self, content):
        def free(graph):
            mask = self.attention(graph).input[3]
            maker = next(node for node in graph.node if mask in node.output)
            maker.input[0] = "inputs_embeds"

        assert self.changed(content, free) is None

    @pytest.mark.parametrize("kind", ["input", "output"])
    def test_a_cache_that_is_read_elsewhere(self, content, kind):
        def read(graph):
            node = self.attention(graph)
            value = node.input[4] if kind == "input" else node.output[1]
            graph.node.add(op_type="Identity", input=[value], output=["copy"])
            graph.output.add(name="copy")

        assert self.changed(content, read) is None

    @pytest.mark.parametrize("width", [12, None], ids=["12", "none"])
    def test_a_head_size_that_the_operator_refuses(self, content, width):
        def narrow(graph):
            cache = next(value for value in graph.input if value.name.startswith(PAST))
            dims = cache.type.tensor_type.shape.dim
            del dims[-1]
            if width:
                dims.add(dim_value=width)

        assert self.changed(content, narrow) is None

    def test_weights_in_another_file(self, content):
        assert rewrite_cache(content, ("other.onnx_data", "x")) is None

    def test_a_missing_protobuf(self, content, monkeypatch):
        monkeypatch.setitem(sys.modules, "google.protobuf.message", None)
        assert rewrite_cache(content) is None


def test_the_messages_keep_what_they_do_not_know(content):
    import onnx

    model = onnx_messages.parse(content)
    assert onnx.ModelProto.FromString(model.SerializeToString()) == onnx.ModelProto.FromString(content)


def test_a_rewritten_graph_is_valid(content):
    import onnx

    model = onnx.ModelProto.FromString(rewrite_cache(content))
    kinds = {node.op_type for node in model.graph.node}
    assert "Attention" not in kinds
    assert "Where" not in kinds  # the mask is gone
