"""Engines answer as ONNX Runtime does. The calls of TensorRT and CUDA go to stand-ins that need no GPU."""

from __future__ import annotations

import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import fake_tensorrt
from checkpoints import Tiny, write
from engine_bundles import VERSION, with_engines
from fake_cuda import Gpu
from PIL import Image

from visprune.bundle import Bundle
from visprune.errors import InputError, UnsupportedError
from visprune.manifest import MANIFEST
from visprune.runtime import Message, Sampling, load
from visprune.runtime.backends.engines import Engines
from visprune.runtime.backends.profiles import Limits
from visprune.runtime.backends.runner import BackendOptions, to_numpy

STEPS = 8
NEVER = 1  # a token that ends no answer


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU of SM86 with TensorRT, whose memory a test may limit."""
    made = Gpu()
    made.install(monkeypatch)
    fake_tensorrt.install(monkeypatch, made, version=VERSION)
    yield made
    made.wait()


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """A float32 bundle pruned before and inside the LLM, so cut into segments; no answer ends early."""
    from visprune.export import export

    folder = tmp_path_factory.mktemp("inside")
    checkpoint = write(Tiny(layers=3, lively=True), folder / "checkpoint")
    options = {"method": "fopru-rank", "ratio": 0.75, "then": "fastv", "target": "rtx", "dtype": "fp32"}
    made = export(checkpoint, verify=False, output=folder / "bundle", **options)
    return _endless(made)


@pytest.fixture(scope="module")
def inside_engines(inside, tmp_path_factory):
    return with_engines(inside, tmp_path_factory.mktemp("engines") / "bundle", size=100_000)


def _endless(bundle):
    manifest = replace(bundle.manifest, decoder=replace(bundle.manifest.decoder, eos_token_ids=(NEVER,)))
    (bundle.path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(bundle.path)


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def turns(pipeline, **keep):
    """Chat in three turns, two of them with images, and return the tokens and the kept visual tokens."""
    chat = pipeline.chat(**keep)
    said = []
    for prompt, images in (("What is it?", [picture(1)]), ("And why?", []), ("This one?", [picture(2)])):
        answer = chat.generate(prompt, images, max_new_tokens=STEPS)
        said.append((answer.token_ids, answer.keep_indices, answer.layer_tokens))
    return said


def logits(pipeline, tokens):
    """Return the logits of a prompt with an image, and those after each of these tokens."""
    chat = pipeline.chat()
    shown = pipeline.loaded.pictures.make([picture(3)])
    text = pipeline.manifest.text
    ids = [5, *[text.image_token_id] * chat._session.image_length(shown[0]), 7, 8]
    found = [chat._session.prefill(ids, shown).logits, *map(chat._session.decode, tokens)]
    return [np.ravel(to_numpy(one)).astype(np.float32) for one in found], [int(one.argmax()) for one in found]


class TestSameAnswers:
    @pytest.mark.parametrize("in_place", [True, False])
    def test_of_segments_over_turns_and_ratios(self, inside, gpu, tmp_path, in_place):
        bundle = with_engines(inside, tmp_path / "engines", in_place=in_place)
        with load(inside.path) as cpu, load(bundle.path, provider="tensorrt") as engines:
            for keep in ({}, {"ratio": 1.0}, {"keep_tokens": 3}):
                assert turns(engines, **keep) == turns(cpu, **keep)
            wanted, found = logits(cpu, range(20, 26)), logits(engines, range(20, 26))
            np.testing.assert_allclose(found[0], wanted[0], atol=1e-4)
            assert found[1] == wanted[1]
            assert len(set(wanted[1])) > 1  # otherwise any answer would pass

    def test_of_the_demo_in_float16(self, rtx, gpu, tmp_path):
        shutil.copytree(rtx.path, tmp_path / "demo")
        demo = _endless(Bundle.open(tmp_path / "demo"))
        bundle = with_engines(demo, tmp_path / "engines")
        with load(demo.path) as cpu, load(bundle.path, provider="tensorrt") as engines:
            assert turns(engines) == turns(cpu)
            wanted, found = logits(cpu, range(20, 24)), logits(engines, range(20, 24))
            np.testing.assert_allclose(found[0], wanted[0], atol=0.1)
            assert found[1] == wanted[1]

    @pytest.mark.parametrize("in_place", [True, False])
    def test_of_conversations_that_continue_and_branch(self, rtx, gpu, tmp_path, in_place):
        shutil.copytree(rtx.path, tmp_path / "demo")
        bundle = with_engines(
            _endless(Bundle.open(tmp_path / "demo")), tmp_path / "engines", in_place=in_place
        )
        first = [Message("user", [picture(1), "What is it?"])]
        second = [*first, Message("assistant", "It is a cat."), Message("user", "And why?")]
        other = [*first, Message("assistant", "It is a cat."), Message("user", "Where is it?")]
        asked = [first, second, other, [Message("user", [picture(1), "Which?"])], first, second]
        said, cached = [], []
        for room in (0, 1 << 30):
            with load(bundle.path, provider="tensorrt", picture_cache=room, prefix_cache=room) as pipeline:
                turns = [pipeline.prepare(messages, max_new_tokens=STEPS) for messages in asked]
                answers = [pipeline.answer(turn).result for turn in turns]
                running = [pipeline.answer(turn) for turn in turns[1:3]]
                waiting = list(running)
                while waiting:
                    waiting = [stream for stream in waiting if stream.step() is not None]
                answers += [stream.result for stream in running]
                said.append([(answer.token_ids, answer.keep_indices) for answer in answers])
                cached.append([answer.tokens_cached > 0 for answer in answers])
        assert said[0] == said[1]
        assert cached[0] == [False] * 8
        assert sum(cached[1]) >= 4

    def test_of_two_conversations_by_turns(self, inside, inside_engines, gpu):
        said = []
        for path, provider in ((inside.path, "cpu"), (inside_engines.path, "tensorrt")):
            with load(path, provider=provider) as pipeline:
                chats = [pipeline.chat(), pipeline.chat(ratio=1.0)]
                said.append(
                    [
                        chat.generate(prompt, images, max_new_tokens=STEPS).token_ids
                        for prompt, images in (("a?", [picture(1)]), ("bc", []), ("d", [picture(2)]))
                        for chat in chats
                    ]
                )
        assert said[0] == said[1]

    def test_of_sampling_which_reads_the_logits(self, inside, inside_engines, gpu):
        for sampling in (Sampling(temperature=0.8, seed=3), Sampling(repetition_penalty=1.5)):
            said = []
            for path, provider in ((inside.path, "cpu"), (inside_engines.path, "tensorrt")):
                with load(path, provider=provider) as pipeline:
                    answer = pipeline.generate(picture(1), "a", max_new_tokens=STEPS, sampling=sampling)
                    said.append(answer.token_ids)
            assert said[0] == said[1]

    def test_of_tensorrt_rtx(self, inside, gpu, tmp_path, monkeypatch):
        fake_tensorrt.install(monkeypatch, gpu, "tensorrt_rtx", "1.7.1")
        bundle = with_engines(inside, tmp_path / "engines", target="rtx", version="1.7.1")
        with load(inside.path) as cpu, load(bundle.path, provider="tensorrt-rtx") as engines:
            assert turns(engines, ratio=0.5) == turns(cpu, ratio=0.5)

    def test_after_a_cut_answer_and_a_reset(self, inside, inside_engines, gpu):
        said = []
        for path, provider in ((inside.path, "cpu"), (inside_engines.path, "tensorrt")):
            with load(path, provider=provider) as pipeline:
                chat = pipeline.chat()
                stream = chat.stream("a", [picture(1)], max_new_tokens=STEPS)
                next(stream)
                tokens = [chat.generate("ab", [picture(1)], max_new_tokens=STEPS).token_ids]
                chat.reset()
                tokens.append(chat.generate("b", [picture(2)], max_new_tokens=STEPS).token_ids)
                said.append(tokens)
        assert said[0] == said[1]


class TestCudaGraphs:
    def test_steps_are_replayed(self, inside_engines, gpu):
        with load(inside_engines.path, provider="tensorrt") as pipeline:
            pipeline.generate(picture(1), "a", max_new_tokens=20)
        # The embedding and two segments: 19 steps each, of which two or three run before one is replayed.
        assert gpu.captures == 3
        assert 3 * 16 <= gpu.launches <= 3 * 17

    def test_one_integer_a_token_comes_to_the_host(self, inside_engines, gpu, monkeypatch):
        from visprune.runtime.backends.device import Device

        counts = []
        download = Device.download
        monkeypatch.setattr(
            Device,
            "download",
            lambda self, block, count: counts.append(count) or download(self, block, count),
        )
        with load(inside_engines.path, provider="tensorrt") as pipeline:
            chat = pipeline.chat()
            chat.generate("a", max_new_tokens=STEPS)
        assert counts == [8] * STEPS

    def test_what_cannot_be_captured_runs_all_the_same_and_is_told_once(
        self, inside, inside_engines, gpu, monkeypatch
    ):
        fake_tensorrt.install(monkeypatch, gpu, version=VERSION, capturable=False)
        with load(inside.path) as cpu, load(inside_engines.path, provider="tensorrt") as engines:
            with pytest.warns(RuntimeWarning, match="without a CUDA graph") as told:
                said = turns(engines)
            assert said == turns(cpu)
        assert len(told) == len({str(one.message) for one in told})
        assert gpu.launches == 0

    def test_no_room_for_what_is_captured_leaves_the_answers(self, inside, inside_engines, gpu, monkeypatch):
        create, made = fake_tensorrt.CudaEngine.create_execution_context, []

        def one_for_each_profile(self, strategy):
            made.append(self)
            if made.count(self) > self.num_optimization_profiles:
                return self.runtime.log.log(fake_tensorrt.ILogger.ERROR, "OutOfMemory")
            return create(self, strategy)

        monkeypatch.setattr(fake_tensorrt.CudaEngine, "create_execution_context", one_for_each_profile)
        with load(inside.path) as cpu, load(inside_engines.path, provider="tensorrt") as engines:
            with pytest.warns(RuntimeWarning, match="without a CUDA graph.*too little"):
                said = turns(engines)
            assert said == turns(cpu)
        assert gpu.captures == 0

    def test_a_failing_capture_leaves_the_answers(self, inside, inside_engines, gpu, monkeypatch):
        begin = gpu.__class__.put

        def put(self, stream, work):
            begin(self, stream, work)
            if self.recording is not None:
                self.forbidden()

        monkeypatch.setattr(gpu.__class__, "put", put)
        with load(inside.path) as cpu, load(inside_engines.path, provider="tensorrt") as engines:
            with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
                said = turns(engines)
            assert said == turns(cpu)

    def test_the_number_of_recordings_is_bounded(self, inside_engines, gpu):
        with load(inside_engines.path, provider="tensorrt") as pipeline:
            chats = [pipeline.chat() for _ in range(6)]
            for chat in chats:
                chat.generate("a", max_new_tokens=STEPS)
            assert gpu.captures > len(gpu._graphs) > 3
            assert len(gpu._graphs) <= 3 * 4


class TestMemory:
    def test_all_of_it_comes_back(self, inside_engines, gpu):
        with load(inside_engines.path, provider="tensorrt") as pipeline:
            turns(pipeline)
        del pipeline
        gc.collect()
        assert gpu.used == 0
        assert gpu.pinned == {}

    def test_low_memory_runs_where_not_all_engines_fit(self, inside, inside_engines, gpu):
        with load(inside_engines.path, provider="tensorrt") as pipeline:
            wanted = turns(pipeline)
        del pipeline
        gc.collect()
        gpu.total, gpu.peak = gpu.peak - 150_000, 0
        with (
            pytest.raises(UnsupportedError, match=r"GPU has .* free memory, and .* needed") as caught,
            load(inside_engines.path, provider="tensorrt") as pipeline,
        ):
            turns(pipeline)
        assert "--low-memory" in caught.value.hint
        del caught
        pipeline = None
        gc.collect()
        with load(inside_engines.path, provider="tensorrt", low_memory=True) as pipeline:
            assert turns(pipeline) == wanted
        assert gpu.peak <= gpu.total

    def test_low_memory_in_another_thread(self, inside_engines, gpu):
        with (
            load(inside_engines.path, provider="tensorrt", low_memory=True) as pipeline,
            ThreadPoolExecutor(1) as threads,
        ):
            wanted = turns(pipeline)
            assert threads.submit(turns, pipeline).result() == wanted

    def test_an_engine_gets_the_memory_that_is_kept_for_later(self, inside_engines, gpu):
        engines = Engines(inside_engines, BackendOptions("tensorrt", 1, low_memory=True))
        before = gpu.used
        engines._device.take(10 << 20)
        assert gpu.used >= before + (10 << 20)
        engines._residents.use("embedding")
        assert gpu.used < before + (10 << 20)

    def test_too_little_is_refused_before_loading(self, inside_engines, gpu):
        gpu.total = 250_000
        for low_memory in (False, True):
            with pytest.raises(UnsupportedError, match=r"GPU has 250 kB of free memory, and"):
                load(inside_engines.path, provider="tensorrt", low_memory=low_memory)
            assert gpu.peak == 0
        gpu.total = 1 << 40


class TestLimits:
    def test_a_conversation_ends_where_engines_have_no_more_room(self, inside, gpu, tmp_path):
        for in_place in (True, False):
            bundle = with_engines(
                inside,
                tmp_path / f"{in_place}",
                in_place=in_place,
                limits=Limits(max_prompt=40, max_cache=50),
                rooms={"decoder_segment_0": 50, "decoder_segment_1": 50} if in_place else None,
            )
            with load(bundle.path, provider="tensorrt") as pipeline:
                chat = pipeline.chat()
                answer = chat.generate("a", [picture(1)], max_new_tokens=100)
                assert answer.finish_reason == "length"
                assert chat.cached_tokens == 50
                with pytest.raises(InputError, match=r"and the engines have room for 50") as caught:
                    chat.generate("b", max_new_tokens=5)
                assert "--max-cache" in caught.value.hint

    def test_a_prompt_beyond_the_profile(self, inside, gpu, tmp_path):
        bundle = with_engines(inside, tmp_path / "engines", limits=Limits(max_prompt=40))
        with load(inside.path) as cpu, load(bundle.path, provider="tensorrt") as pipeline:
            chat = pipeline.chat()
            with pytest.raises(InputError, match=r"takes at most 40 new tokens, and this has \d+") as caught:
                chat.generate("a" * 40, max_new_tokens=2)
            assert "--max-prompt" in caught.value.hint
            found = chat.generate("a", max_new_tokens=4)  # the refused prompt left nothing behind
            assert found.token_ids == cpu.generate(None, "a", max_new_tokens=4).token_ids

    def test_more_pictures_than_the_profile_takes(self, inside_engines, gpu):
        with (
            load(inside_engines.path, provider="tensorrt") as pipeline,
            pytest.raises(InputError, match="at most 16 visual tokens of new pictures") as caught,
        ):
            pipeline.generate([picture(1), picture(2)], "a", ratio=1.0)
        assert "--max-images" in caught.value.hint

    def test_layers_that_hold_fewer_tokens_have_limits_of_their_own(self, inside, gpu, tmp_path):
        rooms = {"decoder_segment_1": 32}
        bundle = with_engines(inside, tmp_path / "engines", rooms=rooms)
        with load(inside.path) as cpu, load(bundle.path, provider="tensorrt") as pipeline:
            answer = pipeline.generate(picture(1), "a", max_new_tokens=200)
            assert answer.finish_reason == "length"
            wanted = cpu.generate(picture(1), "a", max_new_tokens=len(answer.token_ids))
            assert answer.token_ids == wanted.token_ids
            with pytest.raises(InputError, match="after a prune point, and the engines have room for 32"):
                pipeline.generate(picture(1), "a" * 40)
