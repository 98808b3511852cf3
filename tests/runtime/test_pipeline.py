"""The pipeline on the hand-made bundle, against its NumPy reading: whole sequences, no cache."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from visprune.errors import BundleError, InputError, UsageError
from visprune.runtime import Pipeline, Sampling, load

IMAGE, EOS = 2, 1


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    with load(tiny_bundle) as opened:
        yield opened


def prompt_ids(pipeline, text, images, keep):
    tokenizer = pipeline.loaded.tokenizer
    return tokenizer.expand_images(tokenizer.encode(text), [keep] * images)


def pixels(pipeline, *pictures):
    return [pipeline.loaded.pictures.processor(picture) for picture in pictures]


@pytest.mark.parametrize("keep", [1, 4, 16])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_greedy_equals_the_oracle(pipeline, oracle, picture, keep, images):
    pictures = [picture(seed) for seed in range(images)]
    answer = pipeline.generate(pictures, "What?", max_new_tokens=24, keep_tokens=keep)
    ids = prompt_ids(pipeline, f"<bos>user:{'<image>' * images} What?;a:", images, keep)
    arrays = pixels(pipeline, *pictures)
    assert list(answer.token_ids) == oracle.greedy(ids, arrays, keep, 24)
    assert answer.tokens_in == len(ids)
    assert answer.tokens_kept == keep * images
    assert answer.visual_tokens == 16 * images
    assert [list(kept) for kept in answer.keep_indices] == [
        oracle.features(array, keep)[1].tolist() for array in arrays
    ]
    assert answer.finish_reason == ("eos" if answer.token_ids[-1] == EOS else "length")


def test_order_of_images_matters(pipeline, picture):
    one, two = picture(1), picture(2)
    first = pipeline.generate([one, two], "q", max_new_tokens=12)
    second = pipeline.generate([two, one], "q", max_new_tokens=12)
    assert first.keep_indices == second.keep_indices[::-1]


def test_images_may_be_given_in_many_ways(pipeline, picture, tmp_path):
    path = tmp_path / "cat.png"
    picture(3).save(path)
    array, content = np.asarray(picture(3)), path.read_bytes()
    sources = (path, str(path), content, bytearray(content), io.BytesIO(content), picture(3), array)
    made = [pipeline.generate(source, "q", max_new_tokens=6) for source in (*sources, [path], [array])]
    made += [pipeline.chat().generate("q", source, max_new_tokens=6) for source in sources]
    assert len({one.token_ids for one in made}) == 1


def test_several_arrays_are_several_pictures(pipeline, picture):
    pictures = [picture(seed) for seed in range(2)]
    answers = [
        pipeline.generate([read(one) for one in pictures], "q", max_new_tokens=6).token_ids
        for read in (np.asarray, lambda one: one)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("images", [[None], [np.zeros((1, 8, 8, 3), np.uint8)], 5, [[]]])
def test_what_is_no_picture(pipeline, images):
    with pytest.raises(InputError, match="was given") as caught:
        pipeline.generate(images, "q")
    assert "NumPy array of uint8" in caught.value.hint


def test_stream_gives_the_text_of_generate(pipeline, picture):
    stream = pipeline.stream(picture(0), "Say it", max_new_tokens=30)
    pieces = list(stream)
    answer = pipeline.generate(picture(0), "Say it", max_new_tokens=30)
    assert "".join(pieces) == stream.result.text == answer.text
    assert stream.result.token_ids == answer.token_ids
    assert len(pieces) > 1


def test_result_drains_the_stream(pipeline):
    stream = pipeline.stream(None, "Say it", max_new_tokens=5)
    assert len(stream.result.token_ids) <= 5


def test_closed_stream_has_no_result(pipeline):
    stream = pipeline.stream(None, "Say it", max_new_tokens=20)
    next(stream)
    stream.close()
    with pytest.raises(UsageError, match="closed"):
        _ = stream.result


def test_a_closed_pipeline_answers_nothing(tiny_bundle):
    with load(tiny_bundle) as pipeline:
        pass
    with pytest.raises(UsageError, match="pipeline is closed"):
        pipeline.generate(None, "Say it", max_new_tokens=2)


def test_stop_string_ends_the_answer(pipeline):
    whole = pipeline.generate(None, "Say it", max_new_tokens=30).text
    stop = whole[3:5]
    answer = pipeline.generate(None, "Say it", max_new_tokens=30, stop=[stop])
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.index(stop)]


def test_sampling_is_repeatable_and_penalty_sees_the_prompt(pipeline, picture):
    hot = Sampling(temperature=2.0, top_k=50, top_p=0.95, seed=5)
    runs = {pipeline.generate(picture(0), "q", sampling=hot, max_new_tokens=15).token_ids for _ in range(2)}
    assert len(runs) == 1
    other = Sampling(temperature=2.0, top_k=50, top_p=0.95, seed=6)
    assert pipeline.generate(picture(0), "q", sampling=other, max_new_tokens=15).token_ids not in runs
    strict = pipeline.generate(picture(0), "q", sampling=Sampling(repetition_penalty=1e6), max_new_tokens=12)
    assert len(set(strict.token_ids)) == len(strict.token_ids)


def test_timings_name_every_part(pipeline, picture):
    timings = pipeline.generate(picture(0), "q", max_new_tokens=4).timings_ms
    assert list(timings) == [
        "preprocess",
        "vision_encoder",
        "token_pruner",
        "embedding",
        "prefill",
        "decode",
        "decode_per_token",
        "total",
    ]
    assert all(ms >= 0 for ms in timings.values())
    assert "vision_encoder" not in pipeline.generate(None, "q", max_new_tokens=1).timings_ms


class TestLaterTurns:
    def test_each_turn_equals_a_fresh_prefill(self, pipeline, oracle, picture):
        chat = pipeline.chat()
        told, pictures = "<bos>", []
        for turn, new in enumerate([1, 0, 2, 0]):
            added = [picture(10 * turn + i) for i in range(new)]
            pictures += added
            answer = chat.generate(f"turn {turn}", added, max_new_tokens=9)
            told += f"user:{'<image>' * new} turn {turn};"
            ids = prompt_ids(pipeline, told + "a:", len(pictures), 4)
            assert list(answer.token_ids) == oracle.greedy(ids, pixels(pipeline, *pictures), 4, 9)
            assert answer.tokens_in == len(ids)
            assert len(answer.keep_indices) == new
            told += f"assistant: {answer.text}<eos>;"

    def test_only_the_rest_is_fed(self, pipeline, picture, monkeypatch):
        chat = pipeline.chat()
        chat.generate("hello", [picture(0)], max_new_tokens=3)
        held = chat.cached_tokens
        fed = []
        run = chat._session._run

        def watched(ids, new=(), entering=0):
            fed.append((len(ids), len(new)))
            return run(ids, new, entering)

        monkeypatch.setattr(chat._session, "_run", watched)
        answer = chat.generate("and now", max_new_tokens=1)
        assert fed[0][1] == 0  # the image is not encoded again
        assert answer.tokens_in - held <= fed[0][0] < answer.tokens_in - 4

    def test_an_image_is_never_cut(self, pipeline, oracle, picture):
        # The same text around another picture: the cache ends before the picture, not after.
        session = pipeline.chat()._session
        from visprune.runtime.vision.pictures import Picture

        ids = prompt_ids(pipeline, "<bos>user:<image> hi;a:", 1, 4)
        one, two = (Picture(array) for array in pixels(pipeline, picture(1), picture(2)))
        session.prefill(ids, [one])
        assert session.prefill(ids, [one]).keep_indices == ()
        changed = session.prefill(ids, [two])
        assert len(changed.keep_indices) == 1
        rows = oracle.features(two.pixels, 4)[0]
        np.testing.assert_allclose(changed.logits, oracle.logits(ids, rows), atol=1e-4)

    def test_prompt_that_ends_in_an_image_is_fed_again(self, pipeline, picture):
        from visprune.runtime.vision.pictures import Picture

        session = pipeline.chat()._session
        ids = prompt_ids(pipeline, "<bos>ab<image>", 1, 4)
        shown = [Picture(array) for array in pixels(pipeline, picture(1))]
        first = session.prefill(ids, shown)
        again = session.prefill(ids, shown)
        assert again.keep_indices == first.keep_indices
        np.testing.assert_allclose(again.logits, first.logits, atol=1e-5)

    def test_an_abandoned_turn_is_forgotten(self, pipeline, picture):
        chat, fresh = pipeline.chat(), pipeline.chat()
        stream = chat.stream("first", [picture(1)], max_new_tokens=20)
        next(stream)
        after = chat.generate("second", [picture(2)], max_new_tokens=8)
        assert after.token_ids == fresh.generate("second", [picture(2)], max_new_tokens=8).token_ids
        assert [message.role for message in chat.messages] == ["user", "assistant"]

    def test_an_answer_that_spells_the_image_token(self, pipeline, monkeypatch):
        chat = pipeline.chat()
        spelled = [pipeline.loaded.tokenizer.backend.token_to_id(letter) for letter in "a<image>b"] + [EOS]
        letters = iter(spelled)
        monkeypatch.setattr("visprune.runtime.turns.Sampler", lambda *_: lambda *_: next(letters))
        answer = chat.generate("q")
        assert answer.text == "a<image>b"
        monkeypatch.undo()
        chat.generate("and then?", max_new_tokens=2)
        assert chat.messages[1].text == "ab"

    def test_reset(self, pipeline, picture):
        chat = pipeline.chat(keep_tokens=2)
        first = chat.generate("q", [picture(1)], max_new_tokens=8)
        chat.reset()
        assert (chat.messages, chat.cached_tokens) == ((), 0)
        assert chat.generate("q", [picture(1)], max_new_tokens=8).token_ids == first.token_ids

    def test_chats_do_not_disturb_each_other(self, pipeline, picture):
        one, two, alone = (pipeline.chat() for _ in range(3))
        one.generate("a", [picture(1)], max_new_tokens=4)
        two.generate("b", [picture(2)], max_new_tokens=4)
        alone.generate("a", [picture(1)], max_new_tokens=4)
        assert (
            one.generate("c", max_new_tokens=6).token_ids == alone.generate("c", max_new_tokens=6).token_ids
        )


class TestRefusals:
    @pytest.mark.parametrize("prompt", ["", "  \n"])
    def test_empty_prompt(self, pipeline, prompt):
        with pytest.raises(InputError, match="empty"):
            pipeline.generate(None, prompt)

    def test_prompt_that_is_no_text(self, pipeline):
        with pytest.raises(InputError, match="not valid UTF-8"):
            pipeline.generate(None, "what \udcff is")

    def test_image_token_in_the_prompt(self, pipeline):
        with pytest.raises(InputError, match="stands for an image"):
            pipeline.generate(None, "what is <image> here")

    @pytest.mark.parametrize("call", ["Pipeline.generate", "Pipeline.stream", "Chat.generate", "Chat.stream"])
    def test_an_unknown_option_is_named(self, pipeline, call):
        owner, _, method = call.partition(".")
        arguments = (None, "q") if owner == "Pipeline" else ("q",)
        answerer = pipeline if owner == "Pipeline" else pipeline.chat()
        with pytest.raises(TypeError, match=rf"{owner}.stream\(\) .* keyword argument 'top_k'"):
            getattr(answerer, method)(*arguments, max_new_tokens=1, top_k=3)

    def test_an_option_of_an_answer_is_none_of_a_chat(self, pipeline):
        with pytest.raises(TypeError, match=r"Pipeline.chat\(\) .* 'max_new_tokens'"):
            pipeline.chat(max_new_tokens=3)
        with pytest.raises(TypeError, match=r"Chat.stream\(\) .* 'ratio'"):
            pipeline.chat(system=None).stream("q", ratio=0.5)

    def test_ratio_and_count(self, pipeline):
        with pytest.raises(UsageError, match="Both"):
            pipeline.generate(None, "q", ratio=0.5, keep_tokens=4)

    @pytest.mark.parametrize(
        "wrong", [{"ratio": 0.0}, {"ratio": 1.5}, {"keep_tokens": 0}, {"keep_tokens": 17}]
    )
    def test_budgets_that_cannot_be(self, pipeline, wrong):
        with pytest.raises(UsageError):
            pipeline.generate(None, "q", **wrong)

    @pytest.mark.parametrize(
        ("wrong", "what"),
        [
            ({"max_new_tokens": 0}, "Cannot generate 0"),
            ({"stop": [""]}, "A stop string is empty"),
            ({"stop": ""}, "A stop string is empty"),
        ],
    )
    def test_limits_that_mean_nothing(self, pipeline, wrong, what):
        with pytest.raises(UsageError, match=what):
            pipeline.generate(None, "q", **wrong)

    def test_missing_picture(self, pipeline):
        with pytest.raises(InputError, match="no picture"):
            pipeline.generate("/nowhere.png", "q")

    def test_prompt_beyond_the_context(self, pipeline, picture):
        with pytest.raises(
            InputError, match=r"has \d+ tokens, 4 of them visual, and the model's context holds 256"
        ):
            pipeline.generate(picture(0), "x" * 300)

    def test_refused_turn_leaves_the_conversation(self, pipeline):
        chat = pipeline.chat()
        chat.generate("hello", max_new_tokens=3)
        before = (chat.messages, chat.cached_tokens)
        with pytest.raises(InputError):
            chat.generate("x" * 300)
        assert (chat.messages, chat.cached_tokens) == before


class TestManifest:
    def test_generation_ends_at_the_context(self, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, "decoder", context_length=20, eos_token_ids=())
        with load(tiny_copy) as pipeline:
            answer = pipeline.generate(None, "q", max_new_tokens=100)
            assert answer.finish_reason == "length"
            assert answer.tokens_in + len(answer.token_ids) == 21  # the last token is not fed
            full = pipeline.generate(None, "q" * (20 - answer.tokens_in + 1), max_new_tokens=100)
            assert (full.tokens_in, len(full.token_ids)) == (20, 1)

    def test_sliding_window(self, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, "decoder", sliding_window=16)
        with load(tiny_copy) as pipeline, pytest.raises(InputError, match="sliding window holds 16"):
            pipeline.generate(None, "x" * 30)

    def test_original_positions_are_not_run(self, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, "pruning", positions="original")
        with pytest.raises(BundleError, match=r"pruning\.positions should be"):
            load(tiny_copy)

    def test_unknown_value(self, tiny_copy, edit_manifest):
        from dataclasses import replace

        from visprune.bundle import Bundle

        stages = Bundle.open(tiny_copy).manifest.stages
        renamed = replace(stages[0], inputs={"pixel_values": "frames"})
        edit_manifest(tiny_copy, None, stages=(renamed, *stages[1:]))
        with pytest.raises(BundleError, match="frames"):
            load(tiny_copy)

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"num_kv_heads": 3}, r"past_key_values\.0\.key' is float32 \['B', 2, 'P', 4\]"),
            ({"head_dim": 5}, r"past_key_values\.0\.key"),
            ({"cache_dtype": "float16"}, r"has float16 \[1, 2, P, 4\]"),
            ({"num_layers": 1}, "do not cache the 1 layers"),
            ({"num_layers": 10**15}, "do not cache"),
        ],
    )
    def test_another_cache_than_the_graphs(self, tiny_copy, edit_manifest, changes, what):
        edit_manifest(tiny_copy, "decoder", **changes)
        with pytest.raises(BundleError, match=what):
            load(tiny_copy)

    @pytest.mark.parametrize("name", ["chat_template.jinja", "preprocessor_config.json"])
    def test_a_text_that_is_none(self, tiny_copy, name):
        (tiny_copy / name).write_bytes(b"\xff\xfe\x00")
        data = json.loads((tiny_copy / "visprune.json").read_text())
        data["files"][name]["size"] = 3
        (tiny_copy / "visprune.json").write_text(json.dumps(data))
        with pytest.raises(BundleError, match="cannot be read"):
            load(tiny_copy, verify=False)

    def test_no_chat_template(self, tiny_copy, edit_manifest, oracle, picture):
        edit_manifest(tiny_copy, "text", chat_template=None)
        with load(tiny_copy) as pipeline:
            answer = pipeline.generate(picture(0), "hi", max_new_tokens=8)
            ids = prompt_ids(pipeline, "<image>\nhi", 1, 4)
            assert list(answer.token_ids) == oracle.greedy(ids, pixels(pipeline, picture(0)), 4, 8)


def test_every_option_is_explained():
    from visprune.runtime.options import PromptOptions

    for name in PromptOptions.__optional_keys__:
        assert f"\n                {name} (" in Pipeline.stream.__doc__


def test_overlay(pipeline, picture):
    answer = pipeline.generate(picture(0), "q", max_new_tokens=1)
    drawn = pipeline.overlay(picture(0), answer.keep_indices[0])
    assert isinstance(drawn, Image.Image)
    assert drawn.width >= 480


def test_low_memory_changes_no_answer(tiny_bundle, picture):
    answers = []
    for low_memory in (False, True):
        with load(tiny_bundle, low_memory=low_memory) as pipeline:
            answers.append(pipeline.generate(picture(1), "ab", max_new_tokens=4).token_ids)
    assert answers[0] == answers[1]
    with pytest.raises(UsageError, match="'cuda' has no low-memory mode"):
        load(tiny_bundle, provider="cuda", low_memory=True)


def test_threads_and_provider_are_checked(tiny_bundle):
    for threads in (0, 1025, 100_000):
        with pytest.raises(UsageError, match=f"{threads} threads"):
            load(tiny_bundle, threads=threads)
    with pytest.raises(UsageError, match="no provider") as caught:
        load(tiny_bundle, provider="cudaa")
    assert "Did you mean 'cuda'?" in caught.value.hint
