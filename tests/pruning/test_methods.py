"""Every registered method selects what an independent NumPy reading of its definition selects."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import method_oracles

from visprune.errors import UnsupportedError, UsageError
from visprune.export.export_options import MethodRequest, Methods
from visprune.export.models.parts import Features
from visprune.export.scope import pruning_for
from visprune.pruning.base import Layout, VisionPruner
from visprune.pruning.cdpruner import CDPruner
from visprune.pruning.dart import Dart
from visprune.pruning.divprune import DivPrune
from visprune.pruning.fopru import FoPruRank, FoPruRow
from visprune.pruning.freepruner import FreePruner
from visprune.pruning.holov import HoloV
from visprune.pruning.random_draw import Random
from visprune.pruning.registry import BUILTIN, load_method
from visprune.pruning.select import part, ranks
from visprune.pruning.signals import SIGNALS, LayerAttention, SignalSizes
from visprune.pruning.vispruner import VisPruner

SIDE = 6
N = SIDE * SIDE
ALL = range(N)
LAYOUT = Layout(N, (SIDE, SIDE))
BEFORE = [name for name in sorted(BUILTIN) if isinstance(load_method(name)(), VisionPruner)]
ELSEWHERE = ("merges", "resizes")  # see test_merging, and tests/export/test_resize
METHODS = [name for name in BEFORE if not any(getattr(load_method(name), what, False) for what in ELSEWHERE)]
EARLIER = 6  # layers of the vision tower before the feature layer
FREEPRUNER = FreePruner()


def attention_logits(seed, tiles=2, heads=3, prefix=1):
    rng = np.random.default_rng(seed)
    length = prefix + SIDE * SIDE
    return rng.normal(size=(tiles, heads, length, length)).astype(np.float32) * 2


def earlier_logits(seed, tiles=2):
    """Return logits of the layers before the feature layer; in each of them some tokens stand out."""
    layers = [attention_logits(1000 + EARLIER * seed + layer, tiles) for layer in range(EARLIER)]
    rng = np.random.default_rng(seed)
    for logits in layers:
        logits[..., 1 + rng.choice(12, 4, replace=False)] += 1.5
    return np.stack(layers, axis=1)  # [T, layers, H, n, n]


def vision_features(seed, tiles=2):
    return np.random.default_rng(100 + seed).normal(size=(tiles, N, 8)).astype(np.float32)


QUESTION = np.random.default_rng(200).normal(size=(7, 8)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def signals(pruner, late, early=None, prefix=1):
    """Return the signals that an encoder puts out, from logits of the feature layer and of earlier ones."""
    known = {name: torch.from_numpy(value) for name, value in pruner.constants(LAYOUT).items()}
    if getattr(pruner, "needs_text", False):
        known["question_embeds"] = torch.from_numpy(QUESTION)
    tower = [late] if early is None else [*early.swapaxes(0, 1), late]
    for name in pruner.signals:
        signal = SIGNALS[name]
        computed = []
        for layer in signal.layers(len(tower)):
            logits = torch.from_numpy(np.ascontiguousarray(tower[layer]))
            rows = logits if signal.reads == "all" else logits[:, :, :1]
            computed.append(signal.compute(LayerAttention(rows, prefix, 0)))
        known[name] = signal.combine(torch.stack(computed)) if signal.combine else computed[0]
    return known


# Oracles: each definition in float64, with loops and sorting, sharing no code with the product. Each takes
# one tile's logits of the feature layer [H, n, n] and of the earlier ones [layers, H, n, n], its features
# [N, Dv], and K.


def patches(logits):
    return softmax(logits.astype(np.float64)).mean(0)[1:, 1:]


def best(scores, count, among=None):
    """Return the indices of the `count` largest, and check that they are clearly larger than the others."""
    order = sorted(range(len(scores)) if among is None else among, key=lambda j: -scores[j])
    if 0 < count < len(order):
        assert scores[order[count - 1]] - scores[order[count]] > 1e-7
    return sorted(order[:count])


def fopru_rank(late, early, features, keep, tokens=ALL):
    mean = patches(late)
    return best([sum(mean[i][j] for i in range(N)) / N for j in range(N)], keep, tokens)


def fopru_row(late, early, features, keep, tokens=ALL):
    received = patches(late).sum(0)
    rows = [[j for j in tokens if j // SIDE == r] for r in range(SIDE)]
    filled = [r for r in range(SIDE) if rows[r]]
    kept = best([sum(received[j] for j in row) for row in rows], keep // SIDE, filled)
    return [j for r in kept for j in rows[r]]


def uniform(late, early, features, keep, tokens=ALL):
    return [tokens[int((i + 0.5) * len(tokens) / keep)] for i in range(keep)]


def random(late, early, features, keep, tokens=ALL):
    return best(np.random.default_rng(0).permutation(N), keep, tokens)


def none(late, early, features, keep, tokens=ALL):
    return list(tokens)


def cls_attention(late):
    return [np.mean([softmax(head[0].astype(np.float64))[1 + j] for head in late]) for j in range(N)]


def fastervlm(late, early, features, keep, tokens=ALL):
    return best(cls_attention(late), keep, tokens)


def outliers(row):
    q1, q3 = np.percentile(row, [25, 75])
    return [j for j in range(len(row)) if row[j] > q3 + 1.5 * (q3 - q1)]


def others_attention(logits):
    """Return what each token receives from the other patches in one layer."""
    mean = patches(logits)
    return np.array([mean[np.arange(N) != i, i].sum() for i in range(N)])


def degree(late, early, knobs):
    if knobs.layers == "feature":
        return patches(late).sum(0)
    tower = [*early, late]
    first = len(tower) // 2 if knobs.layers == "half" else 0
    degrees = [others_attention(logits) for logits in tower[first:]]
    if knobs.combine == "mean":
        return np.mean([found / found.mean() for found in degrees], axis=0)
    votes = np.bincount([i for found in degrees for i in outliers(found)], minlength=N)
    return votes - np.arange(N) / 1000  # ties go to the first


def freepruner(late, early, features, keep, tokens=ALL, knobs=FREEPRUNER):
    pivots = best(degree(late, early, knobs), max(1, int(keep * knobs.pivot_share + 0.5)), tokens)
    return completed(pivots, chooses(late, early, knobs.complement), keep, tokens)


def chooses(late, early, complement):
    """Return the layer that chooses the complement: of seven layers the third, second, first or last."""
    return late if complement == "feature" else early[{"half": 2, "third": 1, "quarter": 0}[complement]]


def completed(pivots, layer, keep, tokens=ALL):
    seen = patches(layer)
    rest = [j for j in tokens if j not in pivots]
    looked_at = {j: sum(seen[p][j] for p in pivots) for j in rest}
    return sorted(pivots + best([looked_at.get(j) for j in range(N)], max(0, keep - len(pivots)), rest))


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def vispruner(late, early, features, keep, tokens=ALL, share=4):
    important = best(cls_attention(late), int(keep / 2 + 0.5), tokens)
    alive = [j for j in tokens if j not in important]
    diverse = keep - len(important)
    while diverse and len(alive) > diverse:
        even, odd = alive[::2], alive[1::2]
        drop = min(len(alive) - diverse, -(-len(alive) // share))
        nearest = {e: max(cosine(features[e], features[o]) for o in odd) for e in even}
        gone = best([nearest.get(j) for j in range(N)], drop, even)
        alive = [j for j in alive if j not in gone]
    return sorted(important + (alive if diverse else []))


def divprune(late, early, features, keep, tokens=ALL):
    far = [[1 - cosine(features[i], features[j]) for j in range(N)] for i in range(N)]
    nearest = [min((far[j][i] for i in tokens if i != j), default=0.0) for j in range(N)]
    # Two tokens that are each other's nearest tie by definition; the first one wins.
    picked = [max(tokens, key=lambda j: (round(nearest[j], 9), -j))]
    while len(picked) < keep:
        rest = [j for j in tokens if j not in picked]
        nearest = {j: min(far[p][j] for p in picked) for j in rest}
        picked += best([nearest.get(j) for j in range(N)], 1, rest)
    return sorted(picked)


def dart(late, early, features, keep, tokens=ALL, **knobs):
    return method_oracles.dart(features, QUESTION, keep, tokens, **knobs)


def holov(late, early, features, keep, tokens=ALL, **knobs):
    return method_oracles.holov(features, np.array(cls_attention(late)), keep, tokens, **knobs)


def cdpruner(late, early, features, keep, tokens=ALL, **knobs):
    return method_oracles.cdpruner(features, QUESTION, keep, tokens, **knobs)


ORACLES = {
    "cdpruner": cdpruner,
    "dart": dart,
    "divprune": divprune,
    "fastervlm": fastervlm,
    "fopru-rank": fopru_rank,
    "fopru-row": fopru_row,
    "freepruner": freepruner,
    "holov": holov,
    "none": none,
    "random": random,
    "uniform": uniform,
    "vispruner": vispruner,
}


def agrees(pruner, oracle, keep, seed, **options):
    late, early, features = attention_logits(seed), earlier_logits(seed), vision_features(seed)
    got = pruner.select(torch.from_numpy(features), signals(pruner, late, early), keep, LAYOUT)
    assert got.dtype == torch.int64
    assert got.tolist() == [
        oracle(*tile, keep, **options) for tile in zip(late, early, features, strict=True)
    ]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [1, 2, 3, 6, 18, 35, 36])
def test_selects_what_the_definition_says(name, keep):
    pruner = load_method(name)()
    budget = pruner.budget(LAYOUT)
    if not budget.prunable:
        keep = N
    if keep % budget.unit_tokens:
        with pytest.raises(UsageError):
            budget.from_tokens(keep)
        return
    for seed in range(3):
        agrees(pruner, ORACLES[name], budget.from_tokens(keep), seed)


# Rows and columns of a tile that show the picture; the others are padding.
PADDED = [
    (slice(0, 6), slice(2, 6)),
    (slice(1, 4), slice(0, 6)),
    (slice(0, 6), slice(0, 1)),
    (slice(2, 5),) * 2,
]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [1, 2, 6, 12, 18, 24, 36])
def test_padding_is_never_kept_before_a_token(name, keep):
    pruner = load_method(name)()
    budget = pruner.budget(LAYOUT)
    keep = keep if budget.prunable else N
    if keep % budget.unit_tokens:
        return
    late, early, features = attention_logits(7), earlier_logits(7), vision_features(7)
    for first, second in [PADDED[:2], PADDED[2:]]:
        valid = np.zeros((2, SIDE, SIDE), dtype=bool)
        valid[0][first], valid[1][second] = True, True
        valid = valid.reshape(2, N)
        known = signals(pruner, late, early)
        got = pruner.select(torch.from_numpy(features), known, keep, LAYOUT, torch.from_numpy(valid))
        assert got.shape == (2, keep)
        for row, mask, *tile in zip(got.tolist(), valid, late, early, features, strict=True):
            assert row == sorted(set(row))
            tokens = np.flatnonzero(mask).tolist()
            count = keep if budget.unit == "row" else min(keep, len(tokens))
            whole = count == len(tokens) and budget.unit == "token"
            wanted = tokens if whole else ORACLES[name](*tile, count, tokens)
            assert [j for j in row if mask[j]] == wanted


DEGREES = [("all", "mean"), ("all", "votes"), ("half", "mean"), ("half", "votes"), ("feature", "mean")]


@pytest.mark.parametrize(("layers", "combine"), DEGREES)
@pytest.mark.parametrize("complement", ["feature", "half", "third", "quarter"])
def test_freepruner_knobs(layers, combine, complement):
    for share, keep in [(0.01, 18), (0.3, 1), (0.3, 5), (0.3, 36), (1.0, 18)]:
        pruner = FreePruner(layers, combine, share, complement)
        agrees(pruner, freepruner, keep, 7, knobs=pruner)


def test_the_knobs_of_freepruner_change_what_is_kept():
    """Each knob alone changes the choice on these logits, so the test of the knobs tells them apart."""
    every = [
        *(FreePruner(layers, combine) for layers, combine in DEGREES),
        *(FreePruner(complement=complement) for complement in ("half", "third", "quarter")),
        FreePruner(pivot_share=0.3),
    ]
    tiles = list(zip(attention_logits(7), earlier_logits(7), strict=True))
    kept = {str([freepruner(*tile, None, 18, knobs=one) for tile in tiles]) for one in every}
    assert len(kept) == len(every)


def test_votes_have_ties_that_go_to_the_first_token():
    late, early = attention_logits(7), earlier_logits(7)
    pruner = FreePruner(combine="votes", pivot_share=1.0)
    known = signals(pruner, late, early)
    votes = known["degree_votes_all"]
    assert all(len(row.unique()) > 2 for row in votes)
    for row, got in zip(votes.tolist(), pruner.select(None, known, 6, LAYOUT).tolist(), strict=True):
        assert row.count(0.0) > N // 2
        assert got == sorted(sorted(ALL, key=lambda j: (-row[j], j))[:6])


@pytest.mark.parametrize(("layers", "combine"), DEGREES)
def test_freepruner_adaptive_takes_as_many_pivots_as_stand_out(layers, combine):
    pruner, tiles, counts = FreePruner(layers, combine), 6, set()
    late, early = attention_logits(3, tiles), earlier_logits(4, tiles)
    for logits in (late[0], early[0]):  # nearly even: no token stands out
        logits[:] = logits.mean(axis=-2, keepdims=True) * 0.01
    for tile in range(1, tiles):
        late[tile][..., 20 : 20 + tile] += 3
        early[tile][..., 20 : 20 + tile] += 3
    for keep in (1, 8, N):
        got = pruner.adaptive(signals(pruner, late, early), keep)
        assert len(got) == tiles
        for tile in range(tiles):
            scores = degree(late[tile], early[tile], pruner)
            stand_out = outliers(np.ceil(scores) if combine == "votes" else scores)
            pivots = stand_out or best(scores, 1)
            counts.add(len(pivots))
            assert got[tile].tolist() == completed(pivots, late[tile], keep)
            assert len(got[tile]) == max(keep, len(pivots))
    assert len(counts) > 2


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1, 0.01])
def test_vispruner_keeps_the_count_for_every_number(share):
    features, late = vision_features(0), attention_logits(0)
    features[1] = features[1, :1]  # one tile of nothing but duplicates
    pruner = VisPruner(drop_share=share)
    known = signals(pruner, late)
    for keep in range(1, N + 1):
        got = pruner.select(torch.from_numpy(features), known, keep, LAYOUT)
        assert got.shape == (2, keep)
        assert (got.diff(dim=1) > 0).all()


def test_vispruner_rounds_reach_one_token_and_drop_even_ones_only():
    assert VisPruner().rounds(576) == 19
    for share in (0.5, 0.25, 0.01):
        assert VisPruner(drop_share=share).rounds(1) == 0
        assert VisPruner(drop_share=share).rounds(2) == 1
    for keep in (3, 8, 20):
        agrees(VisPruner(drop_share=0.5), vispruner, keep, 5, share=2)
        agrees(VisPruner(drop_share=0.1), vispruner, keep, 5, share=10)


def test_divprune_breaks_ties_by_position():
    """Duplicates, and two tokens that are each other's nearest, differ only in their position."""
    pruner = DivPrune()
    same = torch.ones(1, N, 8)
    assert pruner.select(same, {}, 5, LAYOUT).tolist() == [[0, 1, 2, 3, 4]]
    pair = torch.eye(8)[0].repeat(1, N, 1)
    pair[0, 7], pair[0, 9] = torch.eye(8)[1], torch.tensor([0.0, 3.0, 7.0, 0.1, 0.0, 0.0, 0.0, 0.0])
    assert pruner.select(pair, {}, 1, LAYOUT).tolist() == [[7]]
    assert pruner.select(pair, {}, 2, LAYOUT).tolist() == [[0, 7]]
    assert pruner.select(torch.ones(3, 1, 8), {}, 1, Layout(1, (1, 1))).tolist() == [[0]] * 3


@pytest.mark.parametrize("pivots", [(1, 1), (4, 4), (3, 5), (40, 2)])
def test_dart_knobs(pivots):
    knobs = dict(zip(("image_pivots", "text_pivots"), pivots, strict=True))
    for keep in (1, 7, 30):
        agrees(Dart(**knobs), dart, keep, 3, **knobs)


@pytest.mark.parametrize("words", [1, 2, 3])
def test_dart_uses_the_tokens_of_a_short_question_again(words):
    features = vision_features(4)
    for keep in (6, 12, 20):
        got = Dart().select(
            torch.from_numpy(features), {"question_embeds": torch.from_numpy(QUESTION[:words])}, keep, LAYOUT
        )
        want = [method_oracles.dart(tile, QUESTION[:words], keep, ALL) for tile in features]
        assert got.tolist() == want


@pytest.mark.parametrize("crops", [1, 5, 36, 50])
def test_holov_knobs(crops):
    for keep in (1, 7, 30):
        agrees(HoloV(crops=crops, variance_share=0.5), holov, keep, 3, crops=crops, share=0.5)


def test_holov_passes_the_surplus_of_a_full_crop_on():
    """Nearly all attention lies on the second of sixteen crops, whose three tokens cannot fill the quota."""
    late, features = attention_logits(5), vision_features(5)
    late[:, :, 0, 4:7] += 9
    for keep in (8, 20, 33):
        for tile, row in enumerate(
            HoloV().select(torch.from_numpy(features), signals(HoloV(), late), keep, LAYOUT)
        ):
            assert {3, 4, 5} < set(row.tolist())
            assert row.tolist() == holov(late[tile], None, features[tile], keep)


def test_cdpruner_makes_the_determinant_largest_step_by_step():
    """The definition itself: no step of it is a Cholesky factor."""
    features = np.random.default_rng(1).normal(size=(N, 48)).astype(np.float32)
    question = np.random.default_rng(2).normal(size=(5, 48)).astype(np.float32)
    for relevance, sign in (("unlike", -1), ("alike", 1)):
        score = [sign * np.mean([cosine(one, word) for word in question]) for one in features]
        weight = (np.array(score) - min(score) + 1e-6) / (max(score) - min(score))
        kernel = weight[:, None] * [[cosine(a, b) for b in features] for a in features] * weight
        picked = []
        for keep in range(1, 25):
            rest = [j for j in ALL if j not in picked]
            gains = {j: np.linalg.slogdet(kernel[np.ix_([*picked, j], [*picked, j])])[1] for j in rest}
            picked.append(max(rest, key=gains.get))
            got = CDPruner(relevance).select(
                torch.from_numpy(features)[None],
                {"question_embeds": torch.from_numpy(question)},
                keep,
                LAYOUT,
            )
            assert got.tolist() == [sorted(picked)]
            assert method_oracles.cdpruner(features, question, keep, ALL, sign) == sorted(picked)


@pytest.mark.parametrize("name", ["cdpruner", "dart", "holov"])
def test_every_count_is_exact_with_duplicates(name):
    features, late = vision_features(0), attention_logits(0)
    features[0, 5:20] = features[0, 5]
    features[1] = features[1, :1]  # nothing but duplicates, so all relevances are equal
    known = signals(load_method(name)(), late)
    for keep in range(1, N + 1):
        got = load_method(name)().select(torch.from_numpy(features), known, keep, LAYOUT)
        assert got.shape == (2, keep)
        assert (got.diff(dim=1) > 0).all()
        assert got.min() >= 0
        assert got.max() < N


def test_methods_that_compare_tokens_of_the_llm_see_them_projected():
    found = {name for name in METHODS if getattr(load_method(name), "projected", False)}
    assert found >= {"cdpruner", "dart", "divprune"}
    assert not found & {"fastervlm", "fopru-rank", "freepruner", "holov", "random", "uniform", "vispruner"}


@pytest.mark.parametrize("name", ["fastervlm", "holov", "prumerge+", "visionzip", "vispruner"])
def test_methods_that_need_a_cls_say_what_to_use_instead(name):
    methods = Methods(load_method(name)(), MethodRequest(name, 0.5))
    with pytest.raises(UnsupportedError, match=f"{re.escape(name)} scores with the CLS token") as caught:
        pruning_for(methods, Features((3,), 0, 0, SIDE, 14 * SIDE, 14, 3))
    assert "fopru-rank" in caught.value.hint
    assert pruning_for(methods, Features((3,), 1, 1, SIDE, 14 * SIDE, 14, 3)).keep_tokens == N // 2


def test_the_cls_row_is_the_first_of_all_rows():
    logits = torch.from_numpy(attention_logits(0))
    one, every = (
        SIGNALS["cls_attention"].compute(LayerAttention(rows, 1, 0)) for rows in (logits[:, :, :1], logits)
    )
    assert torch.equal(one, every)
    assert one.shape == (2, N)


def test_a_map_holds_the_visual_tokens_alone():
    logits = attention_logits(2)
    for prefix, skipped in ((1, 0), (0, 1)):
        layer = LayerAttention(torch.from_numpy(logits), prefix, skipped)
        got = SIGNALS["attention_map"].compute(layer)
        want = softmax(logits.astype(np.float64)).mean(1)[:, 1:, 1:]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-4)


def test_early_layers_are_counted_up_to_the_feature_layer():
    names = ("attention_map", "attention_map_half", "attention_map_third", "attention_map_quarter")
    for layers, want in ((23, [22, 10, 6, 4]), (3, [2, 0, 0, 0]), (1, [0, 0, 0, 0])):
        assert [list(SIGNALS[name].layers(layers)) for name in names] == [[layer] for layer in want]
    sizes = SignalSizes(N, 20, 4, 5)
    assert SIGNALS["attention_map"].shape(sizes) == (N, N)
    assert SIGNALS["cls_attention"].shape(sizes) == (N,)
    assert SIGNALS["cls_feature"].shape(sizes) == (20,)
    assert [SIGNALS[name].shape(sizes) for name in ("keys", "mean_keys")] == [(N, 20), (N, 5)]


@pytest.mark.parametrize("share", [0.01, 1 / 3, 0.5, 0.75, 1.0])
def test_a_part_of_a_count_is_rounded_and_never_nothing(share):
    for count in (*range(1, 50), 576, 2880, 60_000):
        exact = Fraction(share).limit_denominator(100) * count
        want = min(count, max(1, int(exact + Fraction(1, 2))))
        assert part(count, share).item() == want


def test_ranks_break_ties_by_position():
    assert ranks(torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0]])).tolist() == [[3.0, 0.0, 4.0, 1.0, 2.0]]


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
    """Rows of a softmax sum to one, so the received vector alone is exported by default."""
    layer = LayerAttention(torch.from_numpy(attention_logits(0, prefix=0)), 0, 0)
    assert (
        SIGNALS["attention_given"].compute(layer).var()
        < 1e-6 * SIGNALS["attention_received"].compute(layer).var()
    )


def test_logits_score_before_the_softmax():
    logits = attention_logits(3)
    pruner = FoPruRank(scores="logits")
    got = pruner.select(torch.zeros(2, 36, 4), signals(pruner, logits), 9, LAYOUT)
    want = [sorted(np.argsort(-tile.mean(0)[1:, 1:].mean(0))[:9].tolist()) for tile in logits]
    assert got.tolist() == want


def test_a_skipped_patch_is_not_a_candidate_but_still_looks():
    """With SigLIP under `default`, the first patch is dropped as a token, and its attention still counts."""
    logits = attention_logits(1, prefix=0)
    layer = LayerAttention(torch.from_numpy(logits), 0, 1)
    want = softmax(logits.astype(np.float64)).mean(1).mean(1)[:, 1:]
    np.testing.assert_allclose(SIGNALS["attention_received"].compute(layer).numpy(), want, rtol=1e-5)


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
    for knobs in (
        {"layers": "last"},
        {"combine": "sum"},
        {"pivot_share": 0.0},
        {"pivot_share": 1.5},
        {"complement": "all"},
        {"layers": "feature", "combine": "votes"},
    ):
        with pytest.raises(UsageError):
            FreePruner(**knobs)
    for method, knobs in (
        (Dart, {"image_pivots": 0}),
        (Dart, {"text_pivots": 0}),
        (HoloV, {"crops": 0}),
        (HoloV, {"variance_share": -0.1}),
        (CDPruner, {"relevance": "near"}),
    ):
        with pytest.raises(UsageError):
            method(**knobs)
    for knobs in ({"important_share": 0.0}, {"drop_share": 0.6}, {"drop_share": 0.0}):
        with pytest.raises(UsageError):
            VisPruner(**knobs)
