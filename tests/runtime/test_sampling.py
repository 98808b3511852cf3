"""Sampling against transformers' logits processors, and its edges."""

import numpy as np
import pytest

from visprune.errors import BundleError, UsageError
from visprune.runtime.sampling import Sampler, Sampling, probabilities

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=0.7, top_k=40),
    Sampling(temperature=1.0, top_k=10_000),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.3, top_p=0.999),
    Sampling(temperature=1.0, top_p=0.05),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=0.8, top_k=50, top_p=0.6, repetition_penalty=1.2),
    Sampling(temperature=1.1, top_p=0.8, repetition_penalty=0.7),
    Sampling(temperature=1.0, repetition_penalty=3.0),
]


def draws():
    rng = np.random.default_rng(0)
    for size, spread in ((7, 1.0), (500, 4.0), (32_000, 3.0), (32_000, 0.1)):
        for _ in range(3):
            logits = (rng.standard_normal(size) * spread).astype(np.float32)
            yield logits, rng.integers(0, size + 5, 60)  # a few ids past the head, as of placeholders


def reference(logits, history, sampling):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    steps = []
    if sampling.repetition_penalty != 1.0:
        steps.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(transformers.TopPLogitsWarper(sampling.top_p))
    scores = torch.from_numpy(logits.copy())[None]
    for step in steps:
        scores = step(torch.from_numpy(history)[None], scores)
    return scores[0].double().softmax(-1).numpy()


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_distributions_equal_transformers(sampling):
    for logits, history in draws():
        ours, theirs = probabilities(logits, history, sampling), reference(logits, history, sampling)
        # transformers adds up in float32: at the edge of a nucleus of thousands a few tokens may differ.
        differing = np.flatnonzero((ours > 0) != (theirs > 0))
        assert differing.size <= (3 if sampling.top_p < 1.0 and logits.size > 10_000 else 0)
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-3 if differing.size else 1e-5, atol=2e-4 * differing.size
        )


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_tokens_are_drawn_from_the_distribution(sampling):
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal(12) * 2).astype(np.float32)
    expected = probabilities(logits, [3, 3, 4], sampling)
    assert expected.sum() == pytest.approx(1.0)
    sampler = Sampler(Sampling(**{**as_arguments(sampling), "seed": 7}))
    counts = np.bincount([sampler(logits, [3, 3, 4]) for _ in range(4000)], minlength=12)
    assert np.abs(counts / 4000 - expected).max() < 0.04
    assert (counts[expected == 0] == 0).all()


def as_arguments(sampling):
    return {name: getattr(sampling, name) for name in Sampling.__slots__}


def test_greedy_takes_the_first_of_equals():
    logits = np.array([1.0, 3.0, 3.0, 2.0], np.float32)
    assert Sampler(Sampling())(logits, []) == 1
    assert probabilities(logits, [], Sampling()).tolist() == [0, 1, 0, 0]


def test_greedy_heeds_the_repetition_penalty():
    logits = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0))(logits, [1, 1, 1]) == 2
    assert Sampler(Sampling(repetition_penalty=2.0))(logits, [1, 2]) == 1
    assert logits.tolist() == [1.0, 3.0, 2.0, -1.0]  # the caller's array stays


def test_equal_logits_at_the_edge_of_top_k_all_stay():
    logits = np.array([2.0, 1.0, 1.0, 0.0], np.float32)
    assert (probabilities(logits, [], Sampling(temperature=1.0, top_k=2)) > 0).tolist() == [
        True,
        True,
        True,
        False,
    ]


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    for top_p, kept in ((0.4, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        chances = probabilities(logits, [], Sampling(temperature=1.0, top_p=top_p))
        assert (chances > 0).sum() == kept
        np.testing.assert_allclose(
            chances[:2].sum() if kept > 1 else chances[0], [1, 1, 0.8 / 0.95, 0.8][kept - 1]
        )


def test_the_same_seed_gives_the_same_tokens():
    rng = np.random.default_rng(2)
    steps = [rng.standard_normal(1000).astype(np.float32) for _ in range(50)]

    def tokens(seed):
        sampler = Sampler(Sampling(temperature=1.0, top_p=0.95, seed=seed))
        return [sampler(logits, []) for logits in steps]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)
    assert all(isinstance(token, int) for token in tokens(3))


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_extreme_temperatures(temperature):
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    chances = probabilities(logits, [], Sampling(temperature=temperature))
    expected = [0, 1, 0] if temperature < 1 else [1 / 3] * 3
    np.testing.assert_allclose(chances, expected, atol=1e-9)


def test_masked_logits_are_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=2, top_p=0.5)):
        assert probabilities(logits, [0], sampling).tolist() == [0, 1, 0]
        assert Sampler(sampling)(logits, [0]) == 1


def test_half_precision_and_a_vocabulary_of_one():
    assert Sampler(Sampling(temperature=0.5, top_k=5, top_p=0.5))(np.zeros(1, np.float16), [0]) == 0
    logits = np.array([1.0, 2.0], np.float16)
    np.testing.assert_allclose(probabilities(logits, [], Sampling(temperature=1.0)), [0.26894142, 0.73105858])


@pytest.mark.parametrize("bad", [[1.0, np.nan, 2.0], [1.0, np.inf, 2.0], [-np.inf] * 3])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=2, top_p=0.9)])
def test_logits_that_are_no_numbers(bad, sampling):
    with pytest.raises(BundleError, match="cannot be used") as caught:
        Sampler(sampling)(np.array(bad, np.float32), [0])
    assert "fp32" in caught.value.hint
    with pytest.raises(BundleError):
        probabilities(np.array(bad, np.float32), [], sampling)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
    ],
)
def test_settings_outside_their_range(name, value):
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("top_k", 5), ("top_p", 0.9), ("seed", 0)])
def test_what_greedy_would_ignore_is_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} has no effect at temperature 0"):
        Sampling(**{name: value})
    Sampling(**{name: value}, temperature=0.7)
