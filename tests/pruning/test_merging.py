"""Every method that merges tokens makes those that an independent NumPy reading of its definition makes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import merging_oracles as oracles

from visprune.errors import UnsupportedError, UsageError
from visprune.pruning.base import Layout
from visprune.pruning.downsample import Downsample
from visprune.pruning.prumerge import PruMergePlus
from visprune.pruning.registry import BUILTIN, load_method, method_name
from visprune.pruning.select import evenly
from visprune.pruning.signals import SIGNALS, LayerAttention
from visprune.pruning.visionzip import VisionZip

SIDE, WIDTH, TILES = 6, 8, 2
N = SIDE * SIDE
ALL = tuple(range(N))
ALONE = Layout(N, (SIDE, SIDE), drops_cls=True)
TILED = Layout(N, (SIDE, SIDE))
COUNTS = (1, 2, 3, 6, 18, 35, 36)
SQUARES = (1, 4, 9, 16, 25, 36)


@dataclass(frozen=True)
class Tile:
    """What an encoder gives of one tile; the first of the n tokens is the CLS token."""

    logits: np.ndarray  # [H, n, n]
    keys: np.ndarray  # [H, n, Dh]
    features: np.ndarray  # [n, Dv]


def tile(seed):
    rng = np.random.default_rng(seed)
    shapes = ((3, N + 1, N + 1), (3, N + 1, 5), (N + 1, WIDTH))
    logits, keys, features = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return Tile(2 * logits, keys, features)


def select(pruner, tiles, keep, layout=TILED, valid=None):
    """Return what a method makes of some tiles."""
    logits, keys, features = (
        torch.from_numpy(np.stack([getattr(one, name) for one in tiles]))
        for name in ("logits", "keys", "features")
    )
    record = LayerAttention(logits[:, :, :1], 1, 0, keys, features[:, 0])
    known = {name: SIGNALS[name].compute(record) for name in pruner.signals}
    mask = None if valid is None else torch.from_numpy(valid)
    return pruner.select(features[:, 1:], known, keep, layout, mask)


def cls_attention(one):
    rows = [np.exp(head[0].astype(np.float64)) for head in one.logits]
    return np.mean([row / row.sum() for row in rows], axis=0)[1:]


def visionzip(one, keep, layout=TILED, tokens=None, **knobs):
    keys = one.keys.astype(np.float64).mean(axis=0)[1:]
    cls = one.features[0] if layout.drops_cls else None
    return oracles.visionzip(one.features[1:], cls_attention(one), keys, keep, tokens, cls=cls, **knobs)


def prumerge(one, keep, layout=TILED, tokens=None, **knobs):
    keys = one.keys.transpose(1, 0, 2).reshape(N + 1, -1)[1:]
    return oracles.prumerge(one.features[1:], cls_attention(one), keys, keep, tokens, **knobs)


def downsample(one, keep, layout=TILED):
    return oracles.downsample(one.features[1:], keep)


ORACLES = {"downsample": downsample, "prumerge+": prumerge, "visionzip": visionzip}


def check(got, want):
    """Compare the tokens that were made of one tile, and check that the weights say how."""
    indices, tokens, weights = want
    assert got.indices.tolist() == indices.tolist()
    np.testing.assert_allclose(got.tokens, tokens, atol=1e-5)
    np.testing.assert_allclose(got.weights, weights, atol=1e-6)


def of_tile(merged, index, rows=slice(None)):
    return type(merged)(merged.tokens[index][rows], merged.indices[index][rows], merged.weights[index][rows])


def agrees(pruner, oracle, keep, seed=0, layout=TILED, **knobs):
    tiles = [tile(seed), tile(100 + seed)]
    got = select(pruner, tiles, keep, layout)
    assert got.indices.dtype == torch.int64
    assert got.tokens.dtype == got.weights.dtype == torch.float32
    for index, one in enumerate(tiles):
        check(of_tile(got, index), oracle(one, keep, layout, **knobs))


def test_every_method_that_merges_has_an_oracle():
    assert {name for name in BUILTIN if getattr(load_method(name), "merges", False)} == set(ORACLES)


@pytest.mark.parametrize("layout", [TILED, ALONE], ids=["tiled", "alone"])
@pytest.mark.parametrize("name", ORACLES)
def test_makes_what_the_definition_says(name, layout):
    pruner = load_method(name)()
    budget = pruner.budget(layout)
    for keep in SQUARES if budget.unit == "square" else COUNTS:
        for seed in range(3):
            agrees(pruner, ORACLES[name], budget.from_tokens(keep), seed, layout)


@pytest.mark.parametrize("name", ORACLES)
def test_all_tokens_stay_as_they_are(name):
    tiles = [tile(seed) for seed in range(TILES)]
    for layout in (TILED, ALONE):
        got = select(load_method(name)(), tiles, N, layout)
        assert got.tokens.numpy().tobytes() == np.stack([one.features[1:] for one in tiles]).tobytes()
        assert got.indices.tolist() == [list(ALL)] * TILES
        assert torch.equal(got.weights, torch.eye(N).expand(TILES, -1, -1))


@pytest.mark.parametrize("layout", [TILED, ALONE], ids=["tiled", "alone"])
@pytest.mark.parametrize("name", ORACLES)
def test_tokens_are_weighted_sums_for_every_count(name, layout):
    pruner = load_method(name)()
    tiles = [tile(seed) for seed in range(TILES)]
    patches = torch.from_numpy(np.stack([one.features[1:] for one in tiles]))
    for keep in SQUARES if pruner.budget(layout).unit == "square" else range(1, N + 1):
        got = select(pruner, tiles, keep, layout)
        assert got.tokens.shape == (TILES, keep, WIDTH)
        assert all(len(set(row)) == keep for row in got.indices.tolist())
        made = got.indices >= 0
        torch.testing.assert_close(got.tokens[made], (got.weights @ patches)[made], rtol=0, atol=1e-6)
        assert not got.weights[~made].any()


def test_visionzip_has_the_published_counts():
    """54 of 64, 108 of 128 and 162 of 192 are dominant; the CLS token counts, and one token is it alone."""
    count = 24 * 24
    layout = Layout(count, (24, 24), drops_cls=True)
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(1, count, 4)).astype(np.float32))
    known = {
        "cls_attention": torch.from_numpy(rng.random((1, count), dtype=np.float32)),
        "mean_keys": torch.from_numpy(rng.normal(size=(1, count, 4)).astype(np.float32)),
        "cls_feature": torch.full((1, 4), 7.0),
    }
    for keep, dominant in ((64, 54), (128, 108), (192, 162), (1, 1)):
        got = VisionZip().select(features, known, keep, layout)
        assert got.indices[0, 0] == -1
        assert (got.tokens[0, 0] == 7.0).all()
        shares = got.weights[0].sum(dim=-1)
        assert ((shares > 0.5) & (shares < 1.5)).sum() == dominant - 1  # made of one patch alone
        assert (shares > 1.5).sum() == keep - dominant  # a target and the mean of its members


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_knobs(share):
    exact = Fraction(share).limit_denominator(100)
    for keep in (1, 5, 18, 35, 36):
        for layout in (TILED, ALONE):
            agrees(VisionZip(dominant_share=share), visionzip, keep, 7, layout, share=exact)
        for few in (1, 3, 100):
            pruner = PruMergePlus(attention_share=share, neighbours=few)
            agrees(pruner, prumerge, keep, 7, share=exact, neighbours=few)


def test_equal_scores_rank_by_position():
    """A tile of one colour: every attention and every key is the same."""
    same = Tile(np.zeros((1, N + 1, N + 1), np.float32), np.ones((1, N + 1, 2), np.float32), tile(0).features)
    got = select(VisionZip(), [same], 12)  # 10 dominant; of the 26 others the first and the 14th are targets
    assert got.indices[0].tolist() == [*range(10), 10, 23]
    assert got.weights[0, 10].nonzero().flatten().tolist() == [*range(10, 23), *range(24, N)]
    got = select(PruMergePlus(neighbours=5), [same], 4)
    assert got.indices[0].tolist() == [0, 6, 18, 30]
    assert [row.nonzero().flatten().tolist() for row in got.weights[0]] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 6],
        [0, 1, 2, 3, 4, 18],
        [0, 1, 2, 3, 4, 30],
    ]


# Rows and columns of a tile that show the picture; the others are padding.
SHOWN = [
    (slice(0, 6), slice(2, 6)),
    (slice(1, 4), slice(0, 6)),
    (slice(0, 6), slice(0, 1)),
    (slice(2, 5), slice(2, 5)),
]


@pytest.mark.parametrize("name", ["prumerge+", "visionzip"])
@pytest.mark.parametrize("keep", [1, 2, 6, 9, 12, 18, 24, 35])
def test_padding_changes_no_token(name, keep):
    """Tokens come before padding, and are what they would be without it."""
    tiles, valid = [], np.zeros((len(SHOWN), SIDE, SIDE), dtype=bool)
    for index, shown in enumerate(SHOWN):
        valid[index][shown] = True
        one = tile(index)
        one.features[1:][~valid[index].ravel()] = 1e6
        one.keys[:, 1:][:, ~valid[index].ravel()] = one.keys[:, 1:2]  # just like a token
        one.logits[:, 0, 1:][:, ~valid[index].ravel()] += 5  # and looked at more than any
        tiles.append(one)
    valid = valid.reshape(-1, N)
    got = select(load_method(name)(), tiles, keep, valid=valid)
    assert got.tokens.shape == (len(SHOWN), keep, WIDTH)
    for index, (one, mask) in enumerate(zip(tiles, valid, strict=True)):
        row = got.indices[index].numpy()
        assert len(set(row.tolist())) == keep
        tokens = tuple(np.flatnonzero(mask).tolist())
        kept = mask[row]
        assert kept.sum() == min(keep, len(tokens))
        check(of_tile(got, index, torch.from_numpy(kept)), ORACLES[name](one, keep, tokens=tokens))


def test_tokens_of_half_precision_are_summed_in_float32():
    features = torch.full((1, N, 4), 1000.0, dtype=torch.float16)
    got = Downsample().select(features, {}, 1, TILED)
    assert got.tokens.dtype == torch.float32  # the sum of the 36 is no float16
    torch.testing.assert_close(got.tokens, torch.full((1, 1, 4), 1000.0))


def test_evenly_spaced_tokens_of_some():
    among = torch.tensor([[True, False, True, True, True, False], [False] * 6])
    for count, want in ((0, []), (1, [3]), (2, [2, 4]), (4, [0, 2, 3, 4]), (9, [0, 2, 3, 4])):
        for number in (count, torch.tensor([[float(count)]])):
            got = evenly(among, number)
            assert got[0].nonzero().flatten().tolist() == want
            assert not got[1].any()


def test_what_a_grid_does_not_have_is_refused():
    for layout in (Layout(35, None), Layout(24, (4, 6))):
        with pytest.raises(UnsupportedError, match="downsample needs a square grid"):
            Downsample().budget(layout)
    with pytest.raises(UsageError, match="square of a side"):
        Downsample().budget(TILED).from_tokens(18)


def test_knobs_that_mean_nothing_are_refused():
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError):
            VisionZip(dominant_share=share)
        with pytest.raises(UsageError):
            PruMergePlus(attention_share=share)
    with pytest.raises(UsageError):
        PruMergePlus(neighbours=0)


def test_the_plus_is_part_of_the_name():
    assert method_name(PruMergePlus) == "prumerge+"
    with pytest.raises(UsageError) as caught:
        load_method("prumerge")
    assert "'prumerge+'" in caught.value.hint
