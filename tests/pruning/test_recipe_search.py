"""The search for a recipe agrees with a plain search written here with loops, and solves hand-made cases."""

from __future__ import annotations

import math
import re
from itertools import combinations, pairwise

import numpy as np
import pytest

from visprune.errors import UnsupportedError
from visprune.pruning.recipe_points import choose_layers, fit_constrained
from visprune.pruning.recipe_search import Search, deletable
from visprune.pruning.recipe_task import Attention, Task
from visprune.work import LayerWork

WORK = LayerWork(16, 40)


class Fake:
    """A sample whose layers attend by fixed weights, normalised over the tokens left.

    Args:
        weights: [L, V + T, V]: what visual and text tokens give each visual token.
        counter: Its only entry counts the layers computed.
    """

    def __init__(self, weights, counter=None):
        self.weights = weights
        self.counter = [0] if counter is None else counter

    def start(self):
        return FakePass(self, np.arange(self.weights.shape[2]), 0)

    def attention(self, layer, alive):
        count = self.weights.shape[2]
        rows = [*alive, *range(count, self.weights.shape[1])]
        given = self.weights[layer][np.ix_(rows, alive)]
        given = given / (given.sum(1, keepdims=True) + 0.5)
        return given[: len(alive)].mean(0), given[len(alive) :].mean(0)


class FakePass:
    def __init__(self, sample, alive, following):
        self.sample, self.alive, self.following = sample, alive, following

    def attend(self, layer):
        assert layer == self.following
        self.following += 1
        self.sample.counter[0] += 1
        return Attention(*self.sample.attention(layer, self.alive))

    def delete(self, indices):
        self.alive = np.delete(self.alive, indices)

    def copy(self):
        return FakePass(self.sample, self.alive, self.following)


def fakes(rng, count, layers, visual, text=3, peaked=3.0):
    counter = [0]
    weights = [np.exp(peaked * rng.normal(size=(layers, visual + text, visual))) for _ in range(count)]
    return [Fake(w, counter) for w in weights], counter


def plain_evaluation(samples, layers, visual, ratio, alpha, allowed):
    """Evaluate by the definition, without shortcuts or shared code: the scheme and the work kept, or None."""

    def layer_work(entered, left):
        d, m = WORK.hidden_size, WORK.intermediate_size
        return 3 * entered * d * d + 2 * entered**2 * d + left * d * d + 3 * left * d * m

    full = layers * layer_work(visual, visual)
    alive = [list(range(visual)) for _ in samples]
    spent = [0 for _ in samples]
    scheme = [0] * layers
    stopped = False
    for layer in range(layers + 1):
        forecast = [
            spent[i] + (layers - layer) * layer_work(len(alive[i]), len(alive[i]))
            for i in range(len(samples))
        ]
        if sum(forecast) / len(samples) <= ratio * full:
            stopped = True
            break
        if layer == layers:
            break
        deleted = []
        for i, sample in enumerate(samples):
            totals = [float(values.sum()) for values in sample.attention(layer, np.arange(visual))]
            stats = sample.attention(layer, np.array(alive[i]))
            may_go = []
            for values, total in zip(stats, totals, strict=True):
                order = sorted(range(len(values)), key=lambda j: (values[j], j))
                longest = 0
                for length in range(1, len(order)):
                    rest = math.fsum(values[j] for j in order[length:])
                    if rest >= (1 - alpha) * total:
                        longest = length
                may_go.append(set(order[:longest]))
            gone = may_go[0] & may_go[1] if layer in allowed else set()
            entered = len(alive[i])
            alive[i] = [token for place, token in enumerate(alive[i]) if place not in gone]
            spent[i] += layer_work(entered, len(alive[i]))
            deleted.append(len(gone))
        scheme[layer] = sum(deleted) // len(samples)
    if not stopped:
        return None
    return tuple(scheme), sum(forecast) / len(samples) / full


def plain_search(samples, layers, visual, ratio, allowed=None):
    low, high, best = 0.0, 1.0, None
    for _ in range(7):
        alpha = (low + high) / 2
        places = range(layers) if allowed is None else allowed
        found = plain_evaluation(samples, layers, visual, ratio, alpha, places)
        if found is None:
            low = alpha
        else:
            high, best = alpha, (*found, alpha)
    return best


@pytest.mark.parametrize("ratio", [0.12, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_the_plain_one(seed, ratio):
    rng = np.random.default_rng(seed)
    layers, visual, count = int(rng.integers(2, 7)), int(rng.integers(2, 30)), int(rng.integers(1, 5))
    samples, _ = fakes(rng, count, layers, visual, peaked=float(rng.uniform(0.5, 4)))
    for allowed in (None, sorted(rng.permutation(layers)[: max(1, layers // 2)].tolist())):
        wanted = plain_search(samples, layers, visual, ratio, allowed)
        task = Task(layers, visual, WORK, ratio)
        if wanted is None:
            with pytest.raises(UnsupportedError, match="cannot be reached"):
                Search(task, samples).fit(allowed)
            continue
        found = Search(task, samples).fit(allowed)
        assert (found.scheme, found.alpha) == (wanted[0], wanted[2])
        assert found.ratio_on_samples == pytest.approx(wanted[1], rel=1e-12)


def test_shortcuts_save_most_of_the_layers():
    samples, counter = fakes(np.random.default_rng(1), 4, 24, 40)
    found = Search(Task(24, 40, WORK, 0.3), samples).fit()
    assert sum(found.scheme) > 0
    plain = 8 * 24 * 4  # seven evaluations of every layer, and the unpruned model
    assert counter[0] < plain / 2


def flat(layers, visual, low=0):
    """Return a sample whose first `low` tokens get no attention, and whose others get equal attention."""
    weights = np.ones((layers, visual + 2, visual))
    weights[:, :, :low] = 0.0
    return Fake(weights)


def test_a_bound_that_is_never_violated_leaves_one_token():
    attention = Attention(np.zeros(5), np.zeros(5))
    assert deletable(attention, (0.0, 0.0), 0.5).tolist() == [0, 1, 2, 3]
    # Text attends only to the last token, and visual tokens to none: all tokens but the last may go.
    attention = Attention(np.zeros(5), np.array([0, 0, 0, 0, 1.0]))
    assert deletable(attention, (0.0, 1.0), 0.5).tolist() == [0, 1, 2, 3]
    # Here visual tokens attend to another token, so both stay.
    attention = Attention(np.array([1.0, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 1.0]))
    assert deletable(attention, (1.0, 1.0), 0.5).tolist() == [1, 2, 3]


def test_nothing_is_left_over_from_the_sample_before():
    """The first sample may lose all tokens but one; the second, with equal tokens, only what alpha allows."""
    idle, busy = flat(2, 8, low=7), flat(2, 8)
    for samples in ([idle, busy], [busy, idle]):
        wanted = plain_evaluation(samples, 2, 8, 0.7, 0.25, range(2))
        assert wanted is not None
        assert plain_search(samples, 2, 8, 0.7)[0] == Search(Task(2, 8, WORK, 0.7), samples).fit().scheme
    alone = Search(Task(2, 8, WORK, 0.8), [busy]).fit()
    assert alone.scheme == plain_search([busy], 2, 8, 0.8)[0]


def test_an_earlier_deletion_can_leave_nothing_to_delete():
    # There are 8 equal tokens; 5 left keep 5/8, and 3/8 is more than alpha = 1/4 allows, so no more may go.
    attention = Attention(np.full(5, 1 / 8), np.full(5, 1 / 8))
    assert deletable(attention, (1.0, 1.0), 0.25).tolist() == []


def test_a_budget_reached_only_after_the_last_layer():
    """In the last layer half of the tokens get no attention; before, all get equal attention."""
    layers, visual = 3, 16
    weights = np.ones((layers, visual + 2, visual))
    weights[-1, :, :8] = 0.0
    samples = [Fake(weights)]
    kept = WORK.before_deletion(visual) + WORK.after_deletion(visual // 2)
    ratio = (2 * WORK.layer(visual) + kept) / (3 * WORK.layer(visual))
    found = Search(Task(layers, visual, WORK, ratio), samples).fit()
    assert found.scheme == (0, 0, 8)
    assert found.alpha == 1 / 128
    assert found.ratio_on_samples == found.ratio_reached == pytest.approx(ratio)


def test_a_budget_that_needs_nothing():
    samples, counter = fakes(np.random.default_rng(0), 2, 3, 9)
    found = Search(Task(3, 9, WORK, 1.0), samples).fit()
    assert (found.scheme, found.alpha, found.ratio_reached) == ((0, 0, 0), 1 / 128, 1.0)
    assert (found.lost_self, found.lost_cross) == ((0.0,) * 3, (0.0,) * 3)
    assert counter[0] == 2 * 3  # the unpruned model alone


def split(layers, visual, together=0):
    """Visual tokens attend only to token 0, text only to token 1 (0 from a layer on), so two must stay."""
    weights = np.zeros((layers, visual + 2, visual))
    weights[:, :visual, 0] = 1.0
    weights[:, visual:, 1] = 1.0
    if together:
        weights[together:, visual:] = weights[together:, :1]
    return Fake(weights)


def work_left(visual, layers, *left):
    """Return the fraction of the work if these tokens are left after each layer; the last number repeats."""
    counts = [visual, *left, *[left[-1]] * (layers - len(left))]
    spent = sum(WORK.before_deletion(n) + WORK.after_deletion(m) for n, m in pairwise(counts))
    return spent / (layers * WORK.layer(visual))


def test_a_budget_that_cannot_be_reached_says_what_can():
    samples = [split(4, 12), split(4, 12)]
    one, two = work_left(12, 4, 1), work_left(12, 4, 2)
    with pytest.raises(UnsupportedError, match="cannot be reached on these samples") as raised:
        Search(Task(4, 12, WORK, (one + two) / 2), samples).fit()
    assert f"keeps {two:.4f}" in raised.value.what
    (asked,) = re.findall(r"at least (0\.\d+)\.", raised.value.hint)
    assert two <= float(asked) < two + 0.001
    assert Search(Task(4, 12, WORK, float(asked)), samples).fit().scheme == (10, 0, 0, 0)


def test_a_budget_that_no_deletion_reaches_is_refused_before_anything_is_computed():
    samples, counter = fakes(np.random.default_rng(0), 2, 4, 12)
    with pytest.raises(UnsupportedError, match="one token left") as raised:
        Search(Task(4, 12, WORK, 0.05), samples)
    assert counter[0] == 0
    (least,) = re.findall(r"at least (0\.\d+)", raised.value.hint)
    Task(4, 12, WORK, float(least)).check_possible(range(4))


def test_one_visual_token_cannot_go():
    samples, _ = fakes(np.random.default_rng(0), 2, 3, 1)
    assert Search(Task(3, 1, WORK, 1.0), samples).fit().scheme == (0, 0, 0)
    with pytest.raises(UnsupportedError):
        Search(Task(3, 1, WORK, 0.9), samples).fit()


def test_down_to_one_visual_token():
    samples = [flat(6, 9, low=8)]
    least = Task(6, 9, WORK, 0.5).least(9, 0, range(6)) / (6 * WORK.layer(9))
    found = Search(Task(6, 9, WORK, least), samples).fit()
    assert found.scheme == (8, 0, 0, 0, 0, 0)
    assert found.alpha == 1 / 128


def test_lost_mass_is_one_minus_what_is_left_of_the_unpruned():
    samples, _ = fakes(np.random.default_rng(3), 3, 5, 20)
    found = Search(Task(5, 20, WORK, 0.5), samples).fit()
    for side, lost in enumerate((found.lost_self, found.lost_cross)):
        wanted = np.zeros((5, 3))
        for index, sample in enumerate(samples):
            alive = np.arange(20)
            done = False
            for layer in range(5):
                stats = sample.attention(layer, alive)
                totals = [v.sum() for v in sample.attention(layer, np.arange(20))]
                gone = deletable(Attention(*stats), totals, found.alpha)
                done = done or not found.scheme[layer]  # in this case each layer until then deletes something
                gone = gone[:0] if done else gone
                wanted[layer, index] = 1 - np.delete(stats[side], gone).sum() / totals[side]
                alive = np.delete(alive, gone)
        assert lost == pytest.approx(wanted.mean(1).tolist(), abs=1e-12)


class TestConstrained:
    def test_layers_are_chosen_as_by_trying_all(self):
        """On statistics that deletions do not change, the choice has the smallest alpha of all choices."""
        for seed in range(4):
            samples, _ = fakes(np.random.default_rng(seed), 3, 7, 30)
            task = Task(7, 30, WORK, 0.5)
            search = Search(task, samples)
            from visprune.pruning.recipe_points import _Table

            table = _Table(task, search.unpruned)
            best = min(table.cost(layers) for layers in combinations(range(6), 2))
            assert table.cost(choose_layers(task, search.unpruned, 2))[0] <= best[0] * 1.1

    def test_at_most_so_many_layers_delete_and_never_the_last(self):
        samples, _ = fakes(np.random.default_rng(5), 3, 8, 40)
        search = Search(Task(8, 40, WORK, 0.5), samples)
        free = search.fit()
        assert sum(map(bool, free.scheme)) > 3
        for points in (1, 2, 3):
            found = fit_constrained(search, free, points)
            assert sum(map(bool, found.scheme)) <= points
            assert not found.scheme[-1]
            assert found.ratio_on_samples <= 0.5
            allowed = [layer for layer, count in enumerate(found.scheme) if count]
            assert plain_search(samples, 8, 40, 0.5, allowed)[0] == found.scheme

    def test_a_fit_that_has_few_points_is_taken_as_it_is(self):
        samples = [flat(6, 9, low=8)]
        search = Search(Task(6, 9, WORK, 0.4), samples)
        free = search.fit()
        assert fit_constrained(search, free, 1) is free

    def test_what_cannot_be_reached_with_so_few_is_said(self):
        samples = [split(6, 12, together=1)]
        first, both = work_left(12, 6, 2), work_left(12, 6, 2, 1)
        search = Search(Task(6, 12, WORK, (first + both) / 2), samples)
        free = search.fit()
        assert free.scheme == (10, 1, 0, 0, 0, 0)
        with pytest.raises(UnsupportedError, match="on these samples") as raised:
            fit_constrained(search, free, 1)
        assert f"keeps {first:.4f}" in raised.value.what
        assert "more prune points" in raised.value.hint
        assert fit_constrained(search, free, 2) is free
