"""Every registered method selects what an independent NumPy reading of its definition selects."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from visprune.errors import UnsupportedError, UsageError
from visprune.pruning.base import Layout, VisionPruner
from visprune.pruning.fopru import FoPruRank, FoPruRow
from visprune.pruning.random_draw import Random
from visprune.pruning.signals import SIGNALS, LayerAttention
from visprune.registry import BUILTIN, load_method

SIDE = 6
LAYOUT = Layout(SIDE * SIDE, (SIDE, SIDE))


def attention_logits(seed, tiles=2, heads=3, prefix=1):
    rng = np.random.default_rng(seed)
    length = prefix + SIDE * SIDE
    return rng.normal(size=(tiles, heads, length, length)).astype(np.float32) * 2


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def signals(pruner, logits, prefix=1):
    layer = LayerAttention(torch.from_numpy(logits), prefix, 0)
    return {name: SIGNALS[name](layer) for name in pruner.signals} | {
        name: torch.from_numpy(value) for name, value in pruner.constants(LAYOUT).items()
    }


def oracle(name, logits, keep):
    """Kept sets, written from the definitions with loops and sorting, sharing nothing with the product."""
    tiles = logits.shape[0]
    n = SIDE * SIDE
    kept = []
    for tile in range(tiles):
        mean = softmax(logits[tile].astype(np.float64)).mean(0)[1:, 1:]
        score = [sum(mean[i][j] for i in range(n)) / n for j in range(n)]
        if name == "fopru-rank":
            kept.append(sorted(sorted(range(n), key=lambda j: -score[j])[:keep]))
        elif name == "fopru-row":
            rows = [sum(score[r * SIDE : (r + 1) * SIDE]) for r in range(SIDE)]
            best = sorted(range(SIDE), key=lambda r: -rows[r])[: keep // SIDE]
            kept.append(sorted(r * SIDE + c for r in best for c in range(SIDE)))
        elif name == "uniform":
            kept.append([int((i + 0.5) * n / keep) for i in range(keep)])
        elif name == "none":
            kept.append(list(range(n)))
        else:
            order = np.random.default_rng(0).permutation(n)
            kept.append(sorted(sorted(range(n), key=lambda j: -order[j])[:keep]))
    return np.array(kept)


@pytest.mark.parametrize("name", sorted(BUILTIN))
@pytest.mark.parametrize("keep", [1, 6, 18, 36])
def test_selects_what_the_definition_says(name, keep):
    pruner = load_method(name)()
    assert isinstance(pruner, VisionPruner)
    budget = pruner.budget(LAYOUT)
    if not budget.prunable:
        keep = SIDE * SIDE
    if keep % budget.unit_tokens:
        with pytest.raises(UsageError):
            budget.from_tokens(keep)
        return
    for seed in range(3):
        logits = attention_logits(seed)
        features = torch.zeros(2, SIDE * SIDE, 4)
        got = pruner.select(features, signals(pruner, logits), budget.from_tokens(keep), LAYOUT)
        assert got.dtype == torch.int64
        np.testing.assert_array_equal(got.numpy(), oracle(name, logits, keep))


def test_variance_rule_takes_the_wider_vector():
    pruner = FoPruRank(direction="variance")
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(size=36) * 0.1, rng.normal(size=36)
    for received, given in ((narrow, wide), (wide, narrow)):
        known = {
            "attention_received": torch.tensor(received)[None],
            "attention_given": torch.tensor(given)[None],
        }
        got = pruner.select(torch.zeros(1, 36, 4), known, 9, LAYOUT)
        assert got.tolist() == [sorted(np.argsort(-wide)[:9].tolist())]


def test_given_attention_hardly_varies():
    """The fact behind exporting the received vector alone: rows of a softmax sum to one."""
    layer = LayerAttention(torch.from_numpy(attention_logits(0, prefix=0)), 0, 0)
    assert SIGNALS["attention_given"](layer).var() < 1e-6 * SIGNALS["attention_received"](layer).var()


def test_logits_score_before_the_softmax():
    logits = attention_logits(3)
    pruner = FoPruRank(scores="logits")
    got = pruner.select(torch.zeros(2, 36, 4), signals(pruner, logits), 9, LAYOUT)
    want = [sorted(np.argsort(-tile.mean(0)[1:, 1:].mean(0))[:9].tolist()) for tile in logits]
    assert got.tolist() == want


def test_a_skipped_patch_is_not_a_candidate_but_still_looks():
    """SigLIP under `default`: the first patch is dropped as a token; its attention still counts."""
    logits = attention_logits(1, prefix=0)
    layer = LayerAttention(torch.from_numpy(logits), 0, 1)
    want = softmax(logits.astype(np.float64)).mean(1).mean(1)[:, 1:]
    np.testing.assert_allclose(SIGNALS["attention_received"](layer).numpy(), want, rtol=1e-5)


def test_row_pruning_needs_a_square():
    for layout in (Layout(35, None), Layout(24, (4, 6))):
        with pytest.raises(UnsupportedError, match="square grid"):
            FoPruRow().budget(layout)


def test_random_follows_its_seed():
    def kept(seed):
        pruner = Random(seed)
        return pruner.select(torch.zeros(1, 36, 4), signals(pruner, attention_logits(0)), 9, LAYOUT).tolist()

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)


def test_knobs_that_mean_nothing_are_refused():
    with pytest.raises(UsageError):
        FoPruRank(scores="cosine")
    with pytest.raises(UsageError):
        FoPruRow(scores="logits", direction="variance")
