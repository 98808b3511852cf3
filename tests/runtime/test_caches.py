"""What is kept from one request to the next: features of pictures, and the caches of conversations."""

from __future__ import annotations

import numpy as np
import pytest

from visprune.runtime import Message, load
from visprune.runtime.bounded import BoundedCache

QUESTIONS = ("What is the letter?", "What color is the letter?")


class TestBounded:
    def test_the_one_unused_for_longest_leaves_first(self):
        cache = BoundedCache(10)
        for key in "abc":
            cache.put(key, key.upper(), 3)
        assert cache.get("a") == "A"
        cache.put("d", "D", 3)
        assert [key for key, _ in cache.items()] == ["c", "a", "d"]
        assert (cache.bytes, cache.hits, cache.misses, cache.get("b")) == (9, 1, 0, None)

    def test_too_large_a_value_and_a_second_one(self):
        cache = BoundedCache(10)
        cache.put("a", 1, 8)
        cache.put("b", 2, 11)
        assert cache.get("a") == 1
        cache.put("a", 3, 10)
        assert (cache.get("a"), cache.bytes, len(cache)) == (3, 10, 1)
        cache.clear()
        assert (cache.bytes, len(cache)) == (0, 0)

    def test_nothing_is_kept_without_room(self):
        cache = BoundedCache(0)
        cache.put("a", 1, 1)
        assert cache.get("a") is None


def ask(pipeline, messages, **options):
    return pipeline.answer(pipeline.prepare(messages, **options)).result


@pytest.fixture(scope="module")
def plain(demo_bundle):
    with load(demo_bundle) as pipeline:
        yield pipeline


@pytest.fixture
def cached(demo_bundle):
    with load(demo_bundle, picture_cache=10_000_000, prefix_cache=100_000_000) as pipeline:
        yield pipeline


@pytest.fixture
def pictures(demo_bundle):
    with load(demo_bundle, picture_cache=10_000_000) as pipeline:
        yield pipeline


class TestPictures:
    def test_another_question_and_another_ratio_reuse_the_features(self, pictures, plain, scene):
        for number, (question, ratio) in enumerate([(q, r) for q in QUESTIONS for r in (0.25, 0.5, 1.0)]):
            found, wanted = (p.generate(scene, question, ratio=ratio) for p in (pictures, plain))
            assert (found.token_ids, found.keep_indices) == (wanted.token_ids, wanted.keep_indices)
            assert found.images_cached == (number > 0)
            assert ("vision_encoder" in found.timings_ms) == (number == 0)
        assert (pictures.caches.pictures.hits, pictures.caches.pictures.misses) == (5, 1)

    def test_one_changed_pixel_is_another_picture(self, pictures, scene):
        pictures.generate(scene, QUESTIONS[0])
        other = np.array(scene)
        other[0, 0] ^= 255
        assert pictures.generate(other, QUESTIONS[0]).images_cached == 0

    def test_the_bound_holds(self, demo_bundle, scene):
        with load(demo_bundle, picture_cache=1) as pipeline:
            for _ in range(2):
                assert pipeline.generate(scene, QUESTIONS[0]).images_cached == 0
            assert pipeline.caches.pictures.bytes == 0

    def test_the_size_is_that_of_the_arrays(self, pictures, scene):
        pictures.generate(scene, QUESTIONS[0])
        specs = {s.name: s for s in pictures.manifest.graphs["vision_encoder"].outputs}
        assert pictures.caches.pictures.bytes > 0
        assert pictures.caches.pictures.bytes % 4 == 0
        assert all(spec.dtype == "float32" for spec in specs.values())

    def test_nothing_is_kept_unasked(self, plain, scene):
        assert plain.generate(scene, QUESTIONS[0]).images_cached == 0
        assert plain.generate(scene, QUESTIONS[0]).images_cached == 0


class TestPrefixes:
    def test_a_continued_conversation_feeds_only_what_is_new(self, cached, plain, scene):
        messages = [Message("user", [scene, QUESTIONS[0]])]
        first = ask(cached, messages)
        messages += [Message("assistant", first.text), Message("user", QUESTIONS[1])]
        second, wanted = ask(cached, messages), ask(plain, messages)
        assert second.token_ids == wanted.token_ids
        assert second.tokens_cached >= first.tokens_in
        assert second.keep_indices == wanted.keep_indices != ()
        assert (second.visual_tokens, second.tokens_kept) == (wanted.visual_tokens, wanted.tokens_kept)
        assert "vision_encoder" not in second.timings_ms

    def test_another_question_about_a_picture_reuses_the_part_before_it(self, cached, plain, scene):
        ask(cached, [Message("user", [scene, QUESTIONS[0]])])
        found = ask(cached, [Message("user", [scene, QUESTIONS[1]])])
        assert found.tokens_cached > 15
        assert found.token_ids == ask(plain, [Message("user", [scene, QUESTIONS[1]])]).token_ids

    def test_two_branches_of_one_conversation(self, cached, plain, scene):
        stem = [Message("user", [scene, QUESTIONS[0]]), Message("assistant", " M")]
        ask(cached, stem[:1])
        for question in (*QUESTIONS, *QUESTIONS):
            branch = [*stem, Message("user", question)]
            assert ask(cached, branch).token_ids == ask(plain, branch).token_ids
        assert cached.caches.prefixes.hits == 4

    def test_another_ratio_or_picture_shares_no_picture(self, cached, plain, scene):
        ask(cached, [Message("user", [scene, QUESTIONS[0]])], ratio=0.5)
        other = ask(cached, [Message("user", [scene, QUESTIONS[0]])], ratio=0.25)
        assert other.tokens_cached == 0
        wanted = ask(plain, [Message("user", [scene, QUESTIONS[0]])], ratio=0.25)
        assert other.keep_indices == wanted.keep_indices
        turned = scene.transpose(2)
        found = ask(cached, [Message("user", [turned, QUESTIONS[0]])])
        assert found.token_ids == ask(plain, [Message("user", [turned, QUESTIONS[0]])]).token_ids

    def test_a_prompt_may_be_computed_whole(self, cached, plain, scene):
        messages = [Message("user", [scene, QUESTIONS[0]])]
        wanted = ask(plain, messages)
        for number in range(2):
            found = ask(cached, messages, reuse_prefix=False)
            assert (found.token_ids, found.tokens_cached) == (wanted.token_ids, 0)
            assert ("token_pruner" in found.timings_ms, found.images_cached) == (True, number)
        found = ask(cached, messages)
        assert (found.images_cached, "token_pruner" in found.timings_ms) == (1, False)

    def test_an_answer_ended_early_leaves_its_prompt(self, cached, plain, scene):
        messages = [Message("user", [scene, QUESTIONS[0]])]
        stream = cached.answer(cached.prepare(messages))
        assert stream.step() is not None
        stream.close()
        found = ask(cached, messages)
        assert found.tokens_cached == found.tokens_in - 1
        assert found.token_ids == ask(plain, messages).token_ids

    def test_turns_in_turn_equal_turns_alone(self, cached, plain, scene):
        turns = [
            cached.prepare([Message("user", [scene.transpose(n), q])]) for n in (0, 1, 4) for q in QUESTIONS
        ]
        streams = [cached.answer(turn) for turn in turns]
        waiting = list(streams)
        while waiting:
            waiting = [stream for stream in waiting if stream.step() is not None]
        for turn, stream in zip(turns, streams, strict=True):
            assert stream.result.token_ids == plain.answer(turn).result.token_ids

    def test_the_bound_and_the_bytes(self, demo_bundle, plain, scene):
        turn = plain.prepare([Message("user", [scene, QUESTIONS[0]])])
        room = plain.cache_bytes(turn.tokens_in + turn.max_new_tokens)
        with load(demo_bundle, prefix_cache=room) as pipeline:
            for number in range(4):
                ask(pipeline, [Message("user", [scene, f"{number} {QUESTIONS[0]}"])])
                assert 0 < pipeline.caches.prefixes.bytes <= room

    def test_the_same_prompt_is_held_once(self, cached, scene):
        for _ in range(3):
            ask(cached, [Message("user", [scene, QUESTIONS[0]])])
            held = cached.caches.prefixes.bytes
        assert held <= cached.cache_bytes(100)
