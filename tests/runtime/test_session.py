"""What a session feeds and what its cache holds, where layers hold different tokens.

The decoder here computes nothing: its keys are the ids of the tokens and its values their positions, and it
keeps the visual tokens that a sum over the whole fed prompt points at, as a method would that asks the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from visprune.budget import LayerBudget
from visprune.bundle import Bundle
from visprune.manifest import Decoder, LayerPruning
from visprune.runtime.executor import Execution
from visprune.runtime.session import Session
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.pictures import Picture

IMAGE, LAYERS, TOKENS = 2, 4, 4
POINTS = (0, 2)


@dataclass
class Decoding:
    """Stands for an executor. What it was fed is in `fed`."""

    points: tuple[int, ...]
    fails: bool = False

    def __post_init__(self):
        self.fed = []

    def run(self, supplied, images=()):
        visual = bool(images)
        if self.fails:
            raise KeyboardInterrupt
        ids = supplied["input_ids"][0]
        self.fed.append({name: np.array(value).tolist() for name, value in supplied.items()})
        if visual:
            self.fed[-1]["pixel_values"] = np.concatenate(
                [image["pixel_values"] for image in images]
            ).tolist()
        held = {layer: supplied[f"past_key_values.{layer}.key"].shape[2] for layer in range(LAYERS)}
        values, position, is_visual = {}, supplied["position_ids"][0], (ids == IMAGE) & visual
        here = np.arange(len(ids))
        for layer in range(LAYERS):
            for part, new in (("key", ids[here]), ("value", position)):
                past = supplied[f"past_key_values.{layer}.{part}"]
                fresh = new.astype(np.float32).reshape(1, 1, -1, 1)
                values[f"present.{layer}.{part}"] = np.concatenate([past, fresh], axis=2)
            if layer not in self.points:
                continue
            point = self.points.index(layer)
            count = int(supplied[f"keep_tokens.{point}"])
            if visual:
                asked = int(ids.sum()) + point
                order = sorted(np.flatnonzero(is_visual), key=lambda i: (i * 7 + asked * 5) % 11)
                chosen = np.sort([*np.flatnonzero(~is_visual), *order[: count - (~is_visual).sum()]])
                values[f"keep_indices.{point}"] = chosen[None]
                here, position, is_visual = here[chosen], position[chosen], is_visual[chosen]
            assert count == len(here)
            anew = supplied.get(f"position_ids.{point + 1}")
            if anew is not None:
                assert anew.shape == (1, len(here))
                assert anew[0, 0] == held[layer + 1]
                position = anew[0]
        values["logits"] = np.array([[[float(values[f"present.{LAYERS - 1}.key"].sum()), 0.0]]])
        own = tuple({"keep_indices": np.arange(TOKENS)[None]} for _ in images)
        return Execution(values, own, {})


@pytest.fixture
def manifest(tiny_bundle):
    """A decoder of four layers that prunes after the first and the third, to half of the tokens."""

    def make(positions="original", points=POINTS, always_kept=0):
        whole = Bundle.open(tiny_bundle).manifest
        inside = None
        if points:
            budget = LayerBudget(len(points), 0.5)
            inside = LayerPruning("fake", {}, points, "attention", positions, budget)
        return replace(
            whole,
            decoder=Decoder(LAYERS, 1, 1, "float32", 100, 200, None, (1,)),
            pruning=replace(whole.pruning, always_kept=always_kept),
            layer_pruning=inside,
        )

    return make


@pytest.fixture
def begin(manifest):
    def make(**changes):
        facts = manifest(**changes)
        executor = Decoding(facts.layer_pruning.layers if facts.layer_pruning else ())
        session = Session(executor, facts, Keep(TOKENS))
        return session, executor

    return make


def picture(seed):
    return Picture(np.full((1, 3, 2, 2), seed, np.float32))


def held(session):
    """Of each layer: the ids of its tokens, and their positions."""
    feeds = session._cache.feeds()
    return [
        [feeds[f"past_key_values.{layer}.{part}"].ravel().tolist() for part in ("key", "value")]
        for layer in range(LAYERS)
    ]


def lengths(session):
    return session._cache.lengths


SHOWN = [10, *[IMAGE] * TOKENS, 11, 12]
AGAIN = [13, *[IMAGE] * TOKENS, 14]
ONE, TWO = picture(1), picture(2)


def test_layers_hold_what_entered_them(begin):
    session, _ = begin()
    done = session.prefill(SHOWN, [ONE])
    assert lengths(session) == (7, 5, 5, 5)  # 4 * 0.5 ** 0.5 and 4 * 0.5, rounded down: both 2
    assert done.layer_tokens == (4, 2, 2, 2)
    assert len(done.keep_indices[0]) == 2


def test_every_point_takes_its_share(begin, manifest):
    facts = manifest()
    facts = replace(facts, layer_pruning=replace(facts.layer_pruning, budget=LayerBudget(2, 0.25)))
    session = Session(Decoding(POINTS), facts, Keep(TOKENS))
    done = session.prefill([*SHOWN, *AGAIN], [ONE, TWO])
    assert lengths(session) == (13, 9, 9, 7)
    assert done.layer_tokens == (8, 4, 4, 2)
    assert sum(map(len, done.keep_indices)) == 2
    assert Keep(TOKENS, 1.0).in_layers(facts, 8) == (8, 8)
    assert Keep(TOKENS).in_layers(facts, 0) == ()


def test_text_is_never_pruned(begin):
    session, _ = begin()
    session.prefill([*SHOWN, *AGAIN], [ONE, TWO])
    for ids, _ in held(session):
        assert [i for i in ids if i != IMAGE] == [10, 11, 12, 13, 14]


def test_survivors_keep_their_positions_and_decoding_goes_on_from_the_unpruned_length(begin):
    session, executor = begin()
    done = session.prefill(SHOWN, [ONE])
    survivors = [1 + i for i in done.keep_indices[0]]
    session.decode(20)
    assert executor.fed[-1]["position_ids"] == [[7]]
    assert held(session)[3] == [[10, IMAGE, IMAGE, 11, 12, 20], [0, *survivors, 5, 6, 7]]
    assert not any(name.startswith("position_ids.") for name in executor.fed[0])


def test_survivors_are_numbered_anew_with_a_counter_for_each_segment(begin):
    session, executor = begin(positions="renumbered")
    session.prefill(SHOWN, [ONE])
    session.decode(20)
    assert executor.fed[-1]["position_ids"] == [[7]]
    assert executor.fed[-1]["position_ids.1"] == [[5]]
    assert executor.fed[-1]["position_ids.2"] == [[5]]
    session.prefill([*SHOWN, 20, *AGAIN], [ONE, TWO])
    assert [positions for _, positions in held(session)] == [
        list(range(14)),
        list(range(10)),
        list(range(10)),
        list(range(10)),
    ]


def test_text_alone_is_counted_too(begin):
    session, executor = begin(positions="renumbered")
    done = session.prefill([10, 11, 12], [])
    assert (done.keep_indices, done.layer_tokens) == ((), ())
    assert (executor.fed[0]["keep_tokens.0"], executor.fed[0]["keep_tokens.1"]) == (3, 3)
    assert lengths(session) == (3, 3, 3, 3)


def test_a_later_turn_keeps_the_cache(begin):
    session, executor = begin()
    session.prefill(SHOWN, [ONE])
    before = held(session)
    session.decode(20)
    done = session.prefill([*SHOWN, 20, 30, 31], [ONE])
    assert executor.fed[-1]["input_ids"] == [[30, 31]]
    assert "pixel_values" not in executor.fed[-1]
    assert (done.keep_indices, done.layer_tokens) == ((), ())
    for (ids, positions), (old, places) in zip(held(session), before, strict=True):
        assert ids == [*old, 20, 30, 31]
        assert positions == [*places, 7, 8, 9]


def test_an_answer_told_in_other_tokens_leaves_the_image_alone(begin):
    session, executor = begin()
    session.prefill(SHOWN, [ONE])
    before = held(session)
    for token in (20, 21, 22):
        session.decode(token)
    session.prefill([*SHOWN, 20, 40, 41], [ONE])
    assert executor.fed[-1]["input_ids"] == [[40, 41]]
    assert executor.fed[-1]["position_ids"] == [[8, 9]]
    assert [ids for ids, _ in held(session)] == [[*old, 20, 40, 41] for old, _ in before]


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize(
    "changed",
    [
        [*SHOWN[:-1], 50],  # the last token of the prompt that chose
        [*SHOWN[:-2], 50, 12],
        SHOWN,  # the last token is fed again, so what it chose is chosen again
        SHOWN[:-1],
        [*SHOWN[:-1], 50, 51, 52],
        [9, *SHOWN[1:]],
    ],
)
def test_an_image_is_fed_again_where_its_prompt_was_taken_back(begin, positions, changed):
    session, executor = begin(positions=positions)
    fresh, _ = begin(positions=positions)
    session.prefill(SHOWN, [ONE])
    session.decode(20)
    done = session.prefill(changed, [ONE])
    assert "pixel_values" in executor.fed[-1]
    assert done.keep_indices == fresh.prefill(changed, [ONE]).keep_indices
    assert held(session) == held(fresh)
    assert session.length == len(changed)


def test_without_points_inside_only_a_cut_image_is_fed_again(begin):
    session, executor = begin(points=())
    session.prefill(SHOWN, [ONE])
    session.prefill([*SHOWN[:-1], 50], [ONE])
    assert executor.fed[-1]["input_ids"] == [[50]]
    assert "pixel_values" not in executor.fed[-1]


def test_only_the_later_image_is_fed_again(begin):
    session, executor = begin()
    session.prefill(SHOWN, [ONE])
    first = held(session)
    session.decode(20)
    session.prefill([*SHOWN, 20, *AGAIN], [ONE, TWO])
    session.prefill([*SHOWN, 20, *AGAIN[:-1], 60], [ONE, TWO])
    assert executor.fed[-1]["input_ids"] == [[*AGAIN[:-1], 60]]
    assert len(executor.fed[-1]["pixel_values"]) == 1
    for (ids, _), (old, _) in zip(held(session), first, strict=True):
        assert ids[: len(old)] == old
        assert ids[len(old) :][:2] == [20, 13]
    # The first image's prompt goes, and both are fed in one.
    session.prefill([*SHOWN[:-1], 70, *AGAIN], [ONE, TWO])
    fresh, _ = begin()
    fresh.prefill([*SHOWN[:-1], 70, *AGAIN], [ONE, TWO])
    assert len(executor.fed[-1]["pixel_values"]) == 2
    assert held(session) == held(fresh)


def test_another_image_in_the_same_place(begin):
    session, executor = begin()
    session.prefill(SHOWN, [ONE])
    session.decode(20)
    session.prefill([*SHOWN, 20, 30], [TWO])
    assert executor.fed[-1]["input_ids"] == [[*SHOWN, 20, 30]]
    assert lengths(session) == (9, 7, 7, 7)


def test_an_interrupted_turn_does_no_harm(begin):
    session, executor = begin()
    session.prefill(SHOWN, [ONE])
    session.decode(20)
    before = held(session)
    executor.fails = True
    for ids, pictures in (([*SHOWN, 20, *AGAIN], [ONE, TWO]), ([*SHOWN, 20, 13, 14, *AGAIN], [ONE, TWO])):
        with pytest.raises(KeyboardInterrupt):
            session.prefill(ids, pictures)
        assert held(session) == before
        assert session.length == 8
    executor.fails = False
    done = session.prefill([*SHOWN, 20, *AGAIN], [ONE, TWO])
    assert executor.fed[-1]["input_ids"] == [AGAIN]
    assert len(done.keep_indices) == 1
    assert lengths(session) == (14, 10, 10, 10)


def test_a_turn_interrupted_after_something_was_taken_back(begin):
    session, executor = begin()
    session.prefill(SHOWN, [ONE])
    executor.fails = True
    with pytest.raises(KeyboardInterrupt):
        session.prefill([*SHOWN[:-1], 50], [ONE])
    executor.fails = False
    assert lengths(session) == (0, 0, 0, 0)
    fresh, _ = begin()
    fresh.prefill(SHOWN, [ONE])
    assert "pixel_values" in executor.fed[0]
    session.prefill(SHOWN, [ONE])
    assert held(session) == held(fresh)


def test_abandoned_turns_change_nothing_that_is_chosen_later(begin):
    """They share their first words with what follows; what is chosen depends on all that is fed at once."""
    session, executor = begin()
    fresh, _ = begin()
    for each in (session, fresh):
        each.prefill(SHOWN, [ONE])
        each.decode(20)
    told = [*SHOWN, 20]
    session.prefill([*told, 13, *[IMAGE] * TOKENS, 15], [ONE, picture(3)])
    session.decode(21)
    session.prefill([*told, 13, 16, 17], [ONE])  # without a picture nothing is chosen: no word is fed again
    assert executor.fed[-1]["input_ids"] == [[16, 17]]
    session.decode(22)
    session.prefill([*told, 13, 16, 18], [ONE])
    assert executor.fed[-1]["input_ids"] == [[18]]
    done = session.prefill([*told, *AGAIN], [ONE, TWO])
    assert executor.fed[-1]["input_ids"] == [AGAIN]
    assert done.keep_indices == fresh.prefill([*told, *AGAIN], [ONE, TWO]).keep_indices
    assert held(session) == held(fresh)


def test_clear_forgets_everything(begin):
    session, executor = begin()
    session.prefill(SHOWN, [ONE])
    session.clear()
    assert (session.length, lengths(session)) == (0, (0, 0, 0, 0))
    session.prefill(SHOWN, [ONE])
    assert executor.fed[0] == executor.fed[1]


def test_a_token_that_is_always_kept_is_not_told_and_may_leave_inside(begin):
    session, executor = begin(always_kept=1)
    ids = [10, *[IMAGE] * (TOKENS + 1), 11]
    done = session.prefill(ids, [ONE])
    assert executor.fed[0]["keep_tokens.0"] == 2 + 3  # text, and 5 * 0.5 ** 0.5 rounded down
    assert done.layer_tokens == (5, 3, 3, 2)
    ids, places = held(session)[3]
    visual = [place - 1 for place, token in zip(places, ids, strict=True) if token == IMAGE]
    assert done.keep_indices == (tuple(int(i) - 1 for i in visual if i >= 1),)


def test_any_sequence_of_prompts_leaves_the_cache_in_order(begin):
    """Random prompts, each a change of the one before: what must hold, holds."""
    rng = np.random.default_rng(0)
    for positions in ("original", "renumbered"):
        session, executor = begin(positions=positions)
        ids, pictures = list(SHOWN), [ONE]
        for step in range(150):
            if rng.random() < 0.1:
                executor.fails = True
                with pytest.raises(KeyboardInterrupt):
                    session.prefill(ids, pictures)
                executor.fails = False
            session.prefill(ids, pictures)
            for _ in range(rng.integers(0, 3)):
                token = int(rng.integers(20, 25))
                session.decode(token)
                ids.append(token)
            self_check(session, ids, len(pictures), positions)
            if len(ids) > 60:
                ids, pictures = list(SHOWN), [ONE]
            kind = rng.integers(0, 4)
            if kind == 0:
                ids += [int(rng.integers(30, 40)), *[IMAGE] * TOKENS, int(rng.integers(30, 40))]
                pictures = [*pictures, picture(step)]
            elif kind == 1:
                ids += rng.integers(30, 40, 3).tolist()
            else:  # other words, somewhere
                place = int(rng.choice([i for i, token in enumerate(ids) if token != IMAGE]))
                ids[place] = int(rng.integers(40, 50))
        assert any("pixel_values" not in fed for fed in executor.fed)


def self_check(session, ids, images, positions):
    first = held(session)[0]
    assert first[0] == ids
    assert first[1] == list(range(len(ids)))
    for (upper, _), (lower, places) in zip(held(session), held(session)[1:], strict=False):
        assert len(lower) <= len(upper)
        assert [i for i in lower if i != IMAGE] == [i for i in ids if i != IMAGE]
        assert images <= lower.count(IMAGE) <= 3 * images
        if positions == "renumbered":
            assert places == list(range(len(lower)))
        else:
            assert places == sorted(set(places))
            assert [ids[int(place)] for place in places] == lower
