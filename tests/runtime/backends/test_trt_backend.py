"""What cannot be run by TensorRT is refused with a sentence, and nothing of it is left."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import fake_tensorrt
from engine_bundles import VERSION, with_engines
from fake_cuda import Gpu

from visprune import machine
from visprune.bundle import Bundle
from visprune.errors import BundleError, InputError, MissingExtraError, UnsupportedError, UsageError
from visprune.manifest import MANIFEST, EngineProfile, FileRecord, Graph, InputRange, TensorSpec
from visprune.records import sha256
from visprune.runtime import Sampling, load
from visprune.runtime.backends.device import Device, DeviceMemoryError
from visprune.runtime.backends.engine_limits import choose_profile
from visprune.runtime.backends.residents import Resident, Residents
from visprune.runtime.backends.runner import Ranked, Specs
from visprune.runtime.kv_cache import KVCache
from visprune.runtime.sampling import Sampler


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    made.install(monkeypatch)
    fake_tensorrt.install(monkeypatch, made, version=VERSION)
    return made


@pytest.fixture(scope="module")
def made(tiny_bundle, tmp_path_factory):
    return with_engines(Bundle.open(tiny_bundle), tmp_path_factory.mktemp("e") / "bundle", in_place=False)


@pytest.fixture
def changed(tiny_bundle, tmp_path):
    """Engines of the tiny bundle, then other fields of the manifest, or other bytes of an engine."""

    def make(content=None, graph="embedding", engine=None, **fields):
        bundle = with_engines(Bundle.open(tiny_bundle), tmp_path / "bundle", in_place=False)
        manifest = bundle.manifest
        if engine:
            fields["engines"] = tuple(
                replace(one, **engine) if one.graph == graph else one for one in manifest.engines
            )
        if content is not None:
            path = bundle.path / f"engines/{graph}.sm86.engine"
            path.write_bytes(content)
            name = f"engines/{graph}.sm86.engine"
            fields["files"] = {**manifest.files, name: FileRecord(len(content), sha256(path))}
        (bundle.path / MANIFEST).write_text(replace(manifest, **fields).to_json(), encoding="utf-8")
        return bundle.path

    return make


def refused(path, kind, what, hint, provider="tensorrt", **options):
    with pytest.raises(kind, match=what) as caught:
        load(path, provider=provider, **options)
    assert hint in caught.value.hint


def test_the_tiny_bundle_answers_the_same(tiny_bundle, made, gpu, picture):
    said = []
    for path, provider in ((tiny_bundle, "cpu"), (made.path, "tensorrt")):
        with load(path, provider=provider) as pipeline:
            said.append(pipeline.generate(picture(1), "ab", max_new_tokens=8).token_ids)
    assert said[0] == said[1]
    assert len(set(said[0])) > 1


class TestMachine:
    def test_no_driver(self, made, gpu, monkeypatch):
        def fail(_):
            raise RuntimeError("libcuda was not found")

        monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuInit", fail)
        refused(made.path, UnsupportedError, "There is no NVIDIA driver", "--provider cpu")

    def test_no_driver_of_the_real_bindings(self):
        driver = pytest.importorskip("cuda.bindings.driver")
        try:
            driver.cuInit(0)
        except RuntimeError:
            with pytest.raises(UnsupportedError, match="no NVIDIA driver"):
                Device()
        else:
            pytest.skip("there is a driver")

    def test_no_gpu(self, made, gpu):
        gpu.devices = 0
        refused(made.path, UnsupportedError, "There is no NVIDIA GPU", "CUDA_VISIBLE_DEVICES")

    def test_no_bindings(self, made, gpu, monkeypatch):
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
        refused(made.path, MissingExtraError, "'cuda-bindings' is not installed", "visprune[jetson]")

    def test_no_tensorrt(self, made, gpu, monkeypatch, tiny_bundle, tmp_path):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        refused(made.path, MissingExtraError, "'tensorrt' is not installed", "visprune[tensorrt]")
        jetson = with_engines(Bundle.open(tiny_bundle), tmp_path / "j", in_place=False, target="jetpack6")
        refused(jetson.path, MissingExtraError, "'tensorrt' is not installed", "--system-site-packages")

    def test_a_failing_driver(self, made, gpu, monkeypatch):
        codes = sys.modules["cuda.bindings.driver"].CUresult
        failing = lambda *_: (codes.CUDA_ERROR_INVALID_VALUE, None)  # noqa: E731
        monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuMemAlloc", failing)
        refused(
            made.path, UnsupportedError, "CUDA failed at cuMemAlloc: CUDA_ERROR_INVALID_VALUE", "nvidia-smi"
        )

    def test_another_gpu(self, made, gpu):
        gpu.sm = 90
        refused(
            made.path, UnsupportedError, "has engines for SM86, and this GPU is SM90", "visprune-build DIR"
        )

    def test_a_gpu_that_the_target_does_not_take(self, tiny_bundle, gpu, monkeypatch, tmp_path):
        fake_tensorrt.install(monkeypatch, gpu, "tensorrt_rtx", "1.7.1")
        options = {"in_place": False, "target": "rtx", "version": "1.7.1"}
        bundle = with_engines(Bundle.open(tiny_bundle), tmp_path / "rtx", **options)
        gpu.sm = 90
        what = "has engines for SM86, and this GPU is SM90"
        refused(bundle.path, UnsupportedError, what, "Export for tensorrt.", "tensorrt-rtx")

    def test_another_version(self, made, gpu, monkeypatch):
        fake_tensorrt.install(monkeypatch, gpu, version="10.15.3")
        refused(
            made.path, UnsupportedError, r"TensorRT 10\.16\.1 .* 10\.15\.3 is installed", "visprune-build"
        )

    def test_a_version_that_the_target_is_not_for(self, made, gpu, monkeypatch):
        fake_tensorrt.install(monkeypatch, gpu, version="10.3.0")
        refused(
            made.path, UnsupportedError, r"TensorRT 10\.3\.0, and the target tensorrt takes", "pip install"
        )

    def test_another_package(self, made, gpu):
        rtx = "tensorrt-rtx"
        refused(made.path, UnsupportedError, "needs engines of TensorRT-RTX", "Use --provider tensorrt", rtx)


class TestFailures:
    """What TensorRT reports by exceptions and by the log comes out as one sentence."""

    def test_of_a_profile(self, made, gpu, monkeypatch):
        kind = fake_tensorrt.ExecutionContext
        choose = kind.set_optimization_profile_async
        monkeypatch.setattr(
            kind, "set_optimization_profile_async", lambda self, _, stream: choose(self, 7, stream)
        )
        with (
            load(made.path, provider="tensorrt") as pipeline,
            pytest.raises(
                BundleError, match=r"cannot create a context for engines/.*: there is no profile 7\."
            ),
        ):
            pipeline.generate(None, "a", max_new_tokens=2)

    def test_of_shapes(self, made, gpu, monkeypatch):
        def fail(self):
            raise RuntimeError("infer_shapes error code: 3")

        monkeypatch.setattr(fake_tensorrt.ExecutionContext, "infer_shapes", fail)
        with (
            load(made.path, provider="tensorrt") as pipeline,
            pytest.raises(BundleError, match=r"cannot infer the output shapes of engines/.*"),
        ):
            pipeline.generate(None, "a", max_new_tokens=2)

    def test_of_memory_after_loading(self, made, gpu, monkeypatch):
        def fail(self, strategy):
            self.runtime.log.log(fake_tensorrt.ILogger.ERROR, "OutOfMemory")

        monkeypatch.setattr(fake_tensorrt.CudaEngine, "create_execution_context", fail)
        with (
            load(made.path, provider="tensorrt") as pipeline,
            pytest.raises(DeviceMemoryError, match="of free memory, which is too little"),
        ):
            pipeline.generate(None, "a", max_new_tokens=2)


class TestBundle:
    def test_no_engines(self, tiny_copy, gpu, edit_manifest):
        edit_manifest(tiny_copy, None, target="jetpack6")
        refused(
            tiny_copy, UnsupportedError, "has no engines", f"visprune-build {tiny_copy} --target jetpack6"
        )

    def test_another_target(self, tiny_bundle, gpu, monkeypatch):
        wanted = "visprune-export MODEL --method fopru-rank --keep-tokens 4 --target rtx"
        what = "was exported for onnxruntime, and tensorrt-rtx needs"
        refused(tiny_bundle, UnsupportedError, what, wanted, "tensorrt-rtx")
        for processor, target in (("x86_64", "tensorrt"), ("aarch64", "jetpack7-orin")):
            monkeypatch.setattr(platform, "machine", lambda name=processor: name)
            refused(tiny_bundle, UnsupportedError, "was exported for", f"--target {target}.")

    @pytest.mark.parametrize(
        ("sm", "version", "target"),
        [
            (87, "10.3.0", "jetpack6"),
            (87, "10.16.1", "jetpack7-orin"),
            (110, "10.13.3", "jetpack7.0-thor"),
            (110, "10.16.1", "jetpack7-thor"),
            (90, "10.16.1", "tensorrt"),
        ],
    )
    def test_another_target_is_told_by_gpu_and_version(
        self, tiny_bundle, gpu, monkeypatch, sm, version, target
    ):
        fake_tensorrt.install(monkeypatch, gpu, version=version)
        monkeypatch.setattr(machine, "gpu", lambda: machine.Gpu("Orin", sm))
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        refused(tiny_bundle, UnsupportedError, "was exported for", f"--target {target}.")

    def test_a_graph_without_an_engine(self, made, changed, gpu):
        left = tuple(one for one in made.manifest.engines if one.graph != "embedding")
        refused(changed(engines=left), BundleError, "no engine of embedding", "visprune-build")

    def test_a_corrupted_engine(self, changed, gpu):
        path = changed()
        file = path / "engines/embedding.sm86.engine"
        content = bytearray(file.read_bytes())
        content[0] ^= 1
        file.write_bytes(content)
        refused(path, BundleError, "embedding.sm86.engine was altered", "Copy the bundle again")
        refused(
            path, BundleError, "cannot load engines/embedding.sm86.engine: .*magicTag", "Build", verify=False
        )

    def test_an_engine_of_another_graph(self, made, changed, gpu):
        other = made.file("engines/vision_encoder.sm86.engine").read_bytes()
        refused(changed(other), BundleError, "does not fit the manifest, because of 'inputs_embeds'", "Copy")

    def test_an_engine_of_other_profiles(self, changed, gpu):
        path = changed(engine={"profiles": ()}, graph="decoder_model_merged")
        refused(path, BundleError, "because of its profiles", "build its engines")

    @pytest.mark.parametrize("name", ["nothing", "input_ids"])
    def test_ranges_that_fit_no_input(self, changed, gpu, name):
        wrong = EngineProfile("all", {name: InputRange((1,), (1,), (1,))})
        path = changed(engine={"profiles": (wrong,)})
        refused(path, BundleError, f"do not fit the input '{name}'", "Build the engines again")

    def test_nothing_stays_on_the_gpu(self, changed, gpu):
        import gc

        refused(changed(b"nonsense", graph="decoder_model_merged"), BundleError, "cannot load", "Build")
        gc.collect()
        assert gpu.used == 0

    def test_threads_mean_nothing(self, made, gpu):
        refused(made.path, UsageError, "no processor threads", "Leave", threads=2)


class TestFit:
    GRAPH = Graph("", None, (TensorSpec("ids", "int64", ("B", "S")), TensorSpec("k", "int64", ())), ())
    PROFILES = (
        EngineProfile(
            "prefill", {"ids": InputRange((1, 1), (1, 8), (1, 9)), "k": InputRange((1,), (2,), (3,))}
        ),
        EngineProfile(
            "decode", {"ids": InputRange((1, 1), (1, 1), (1, 2)), "k": InputRange((1,), (2,), (3,))}
        ),
    )

    def choose(self, length, count):
        return choose_profile(self.PROFILES, "g", self.GRAPH, {"ids": (1, length), "k": (count,)})

    def test_decoding_first(self):
        assert [self.choose(length, 2) for length in (1, 2, 3, 9)] == [1, 1, 0, 0]
        assert choose_profile((), "g", self.GRAPH, {}) == 0

    def test_need_and_maximum(self):
        with pytest.raises(InputError, match="engine of g takes at most 9 new tokens, and this has 10"):
            self.choose(10, 2)
        with pytest.raises(InputError, match="engine of g takes at most 3 k, and this has 4"):
            self.choose(1, 4)
        with pytest.raises(InputError, match="at least 1 k, and this has 0"):
            self.choose(1, 0)


class Fake:
    """A runner that takes memory."""

    def __init__(self, name, memory):
        if memory["free"] < memory[name]:
            raise DeviceMemoryError(memory[name], memory["free"])
        self.name, self.memory = name, memory
        memory["free"] -= memory[name]

    def infer(self, feeds):
        return {"by": self.name}

    def __exit__(self, *_):
        self.memory["free"] += self.memory[self.name]


class TestResidents:
    def residents(self, guess=lambda name: 4, evict=True, **memory):
        memory = {"a": 4, "b": 4, "c": 4, **memory}
        return Residents(lambda name: Fake(name, memory), guess, lambda: memory["free"], evict=evict)

    def test_the_last_used_stay(self):
        among = self.residents(free=9)
        for name, opened in (("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("b", "cb")):
            assert Resident(name, Specs((), ()), among).infer({}) == {"by": name}
            assert "".join(among.open) == opened

    def test_one_that_takes_more_than_was_thought(self):
        among = self.residents(free=9, b=6)
        among.use("a")
        among.use("b")
        assert among.open == ("b",)
        with pytest.raises(DeviceMemoryError):
            self.residents(free=3).use("a")

    def test_none_is_closed_where_that_was_not_asked_for(self):
        among = self.residents(free=7, evict=False)
        among.use("a")
        with pytest.raises(DeviceMemoryError):
            among.use("b")
        assert not among.make_room()
        assert among.open == ("a",)

    def test_room_is_made_but_not_of_what_runs(self):
        among = self.residents(free=9)
        among.use("a")
        assert not among.make_room()
        among.use("b")
        assert among.make_room()
        assert among.open == ("b",)


class Cut:
    """A cache value that is cut where it is."""

    shareable = False

    def __init__(self, length):
        self.length = length

    def shape(self):
        return (1, 2, self.length, 4)

    def numpy(self):
        raise AssertionError("it went through the host")

    def cropped(self, length):
        return Cut(length)


def test_a_cache_that_can_be_cut_stays_where_it_is(made):
    decoder = made.manifest.decoder
    cache = KVCache(decoder)
    cache.update(
        {f"present.{i}.{part}": Cut(9) for i in range(decoder.num_layers) for part in ("key", "value")}
    )
    cache.crop([5] * decoder.num_layers)
    assert cache.lengths == (5,) * decoder.num_layers


class Known:
    def __init__(self, best):
        self.best = best

    def shape(self):
        return (1, 1, 3)

    def numpy(self):
        return np.array([[[0.0, 1.0, np.inf if self.best < 0 else 2.0]]], np.float32)

    def argmax(self):
        return self.best


def test_greedy_takes_the_token_that_is_known():
    assert isinstance(Known(1), Ranked)
    assert not isinstance(np.zeros(3), Ranked)
    assert Sampler(Sampling())(Known(1), []) == 1  # though 2 is larger
    assert Sampler(Sampling(repetition_penalty=100.0))(Known(1), [2]) == 1
    assert Sampler(Sampling(temperature=0.01, seed=0))(Known(1), []) == 2


def test_logits_that_cannot_be_used_are_refused():
    for sampling in (Sampling(), Sampling(repetition_penalty=1.1)):
        with pytest.raises(BundleError, match="logits that cannot be used: the largest is"):
            Sampler(sampling)(Known(-1), [])
