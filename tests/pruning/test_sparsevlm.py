"""SparseVLM's raters, their attention and the counts, against NumPy written from the definition."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from visprune.export.graph import attention
from visprune.export.graph.attention import Recorder, recording
from visprune.pruning.sparsevlm import SparseVLM


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def raters(embeds, visual):
    """Places of the raters [R] of one prompt, in float64."""
    after = np.arange(np.flatnonzero(visual)[-1] + 1, len(embeds))
    share = softmax(embeds[visual] @ embeds[after].T).mean(axis=0)
    assert len(after) < 2 or np.abs(share - share.mean()).min() > 1e-4 * share.mean(), (
        "no margin: another seed"
    )
    above = after[share > share.mean()]
    return above if len(above) else after


def prompt(pattern, width=24, seed=0, dtype=np.float32):
    """Embeddings [S, D] of a prompt with text where the pattern has t and visual tokens where it has v."""
    rng = np.random.default_rng(seed)
    embeds = (0.5 * rng.standard_normal((len(pattern), width))).astype(dtype)
    return embeds, np.array([kind == "v" for kind in pattern])


def found(embeds, visual):
    marks = SparseVLM().raters(torch.from_numpy(embeds)[None], torch.from_numpy(visual)[None])
    assert marks.shape == (1, len(visual))
    assert marks.dtype == torch.bool
    return np.flatnonzero(marks[0].numpy())


PROMPTS = {
    "one picture": "t" * 5 + "v" * 16 + "t" * 9,
    "two pictures": "tt" + "v" * 9 + "ttt" + "v" * 16 + "t" * 7,
    "no text before": "v" * 4 + "t" * 12,
    "one token of text": "tt" + "v" * 9 + "t",
    "a large picture": "t" * 35 + "v" * 576 + "t" * 40,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", PROMPTS)
def test_the_raters(name, dtype):
    embeds, visual = prompt(PROMPTS[name], width=256 if "large" in name else 24, dtype=dtype)
    wanted = raters(embeds.astype(np.float64), visual)
    assert found(embeds, visual).tolist() == wanted.tolist()
    if len(PROMPTS[name]) - visual.nonzero()[0][-1] > 2:
        assert 0 < len(wanted) < PROMPTS[name].rindex("t") - visual.nonzero()[0][-1]


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_text_of_equal_tokens_rates_as_a_whole(number):
    embeds, visual = prompt("tvvvvv" + "t" * number)
    embeds[6:] = embeds[6]
    assert found(embeds, visual).tolist() == list(range(6, 6 + number))


@pytest.mark.parametrize("pattern", ["t", "tttt"])
def test_without_pictures_all_rate(pattern):
    assert len(found(*prompt(pattern))) == len(pattern)


def test_a_prompt_that_ends_with_a_picture_has_no_raters():
    assert len(found(*prompt("ttvvvv"))) == 0
    assert len(found(*prompt("v"))) == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (10, 5), (6, 1)])
@pytest.mark.parametrize("past", [0, 3])
def test_the_attention_of_the_raters(heads, kv_heads, past):
    """Weights of queries give the mean over heads and raters, whatever parts the heads are in."""
    rng, length, size = np.random.default_rng(heads), 6, 8
    query, key, value = (
        rng.standard_normal((1, count, rows, size)).astype(np.float32)
        for count, rows in ((heads, length), (kv_heads, past + length), (kv_heads, past + length))
    )
    mask = np.triu(np.full((length, past + length), -1e30, np.float32), past + 1)
    rates = np.array([0, 0, 1, 0, 1, 1], np.float32)
    recorder = Recorder(weights=torch.from_numpy(rates / rates.sum())[None])
    with recording(recorder):
        out, _ = attention._native(
            torch.nn.Module(), *map(torch.from_numpy, (query, key, value, mask[None, None]))
        )
    shared = heads // kv_heads
    probabilities = [
        softmax(query[0, head] @ key[0, head // shared].T / np.sqrt(size) + mask) for head in range(heads)
    ]
    wanted = np.mean([rows[rates > 0] for rows in probabilities], axis=(0, 1))
    np.testing.assert_allclose(recorder.value[0, 0].numpy(), wanted, atol=1e-6)
    mixed = np.stack([rows @ value[0, head // shared] for head, rows in enumerate(probabilities)], axis=1)
    np.testing.assert_allclose(out[0].numpy(), mixed, atol=1e-5)


@pytest.mark.parametrize(
    ("points", "ratio", "counts"),
    [
        (3, None, (331, 191, 110)),
        (2, None, (251, 110)),
        (1, None, (110,)),
        (3, 0.125, (288, 144, 72)),
        (3, 1.0, (576, 576, 576)),
        (3, 1 / 576, (69, 8, 1)),
    ],
)
def test_the_counts(points, ratio, counts):
    assert SparseVLM().budget(points).kept(576, ratio) == counts
