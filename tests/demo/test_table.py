"""The demo's table: what its methods choose, and which it says to lose."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from visprune.demo import MODEL_DIR
from visprune.demo.evaluate import COUNTS, evaluate, hold_out
from visprune.demo.held_out import FIRST_TEST_SCENE
from visprune.demo.result import Result, loss_lines, losses, table
from visprune.demo.table_methods import METHODS, PRUNERS
from visprune.pruning.base import Merged, VisionPruner
from visprune.pruning.registry import BUILTIN, load_method

IMAGES = 6


@pytest.fixture(scope="module")
def demo():
    model = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    return model, tokenizer, hold_out(model, tokenizer, IMAGES, FIRST_TEST_SCENE)


def test_every_method_before_the_llm_is_in_the_table():
    before = {name for name in BUILTIN if load_method(name).place == "before the LLM"}
    assert before - {"none", "random"} <= set(PRUNERS)
    assert {"random", "freepruner, first reading"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_the_counts_of_the_columns(name, demo):
    *_, data = demo
    for count in COUNTS:
        chosen = METHODS[name](data, count, np.random.default_rng(0))
        kept = {64: 60, 16: 12}.get(count, count) if name == "fopru-row" else count
        assert chosen.features.shape == (IMAGES, kept, data.features.shape[2])
        assert chosen.indices.shape == (IMAGES, kept)
        if chosen.weights is None:
            assert (chosen.indices.diff(dim=1) > 0).all()
            assert torch.equal(chosen.features[3], data.features[3, chosen.indices[3]])
        else:
            assert chosen.weights.shape == (IMAGES, kept, data.tokens)


@pytest.mark.parametrize("name", PRUNERS)
def test_an_image_is_chosen_from_by_its_own_signals_and_question(name, demo):
    """Batches are put together and taken apart again: the fifth image alone gives the same."""
    *_, data = demo
    pruner: VisionPruner = PRUNERS[name]
    known = {key: data.signals[key][4:5] for key in pruner.signals}
    known |= {key: torch.from_numpy(value) for key, value in pruner.constants(data.layout).items()}
    known["question_embeds"] = data.question_embeds[data.asked[4].text]
    tokens = data.projected if getattr(pruner, "projected", False) else data.features
    alone = pruner.select(tokens[4:5], known, 36, data.layout)
    among = METHODS[name](data, 36, np.random.default_rng(0))
    indices = alone.indices if isinstance(alone, Merged) else alone
    assert torch.equal(indices[0], among.indices[4])
    if isinstance(alone, Merged):
        torch.testing.assert_close(alone.tokens[0], among.features[4])


def test_the_unpruned_model_is_measured_first(demo):
    model, tokenizer, data = demo
    first = next(evaluate(model, tokenizer, data))
    assert (first.method, first.count, first.kept, first.work) == ("none", 144, "144", 1.0)
    assert sum(first.right) > 0


def result(method, right, kept="16"):
    return Result(method, 16, kept, 0.1, tuple([True] * right + [False] * (100 - right)), 1.0)


def test_only_a_certain_loss_is_told():
    """Of 100 questions; the intervals are those of Bonett and Price, computed by hand."""
    results = [
        Result("none", 144, "144", 1.0, (True,) * 100, 1.0),
        result("better", 90),
        result("a little worse", 68),
        result("worse", 50, kept="12"),
        result("random", 70),
    ]
    (loss,) = losses(results)
    assert (loss.method, loss.count, loss.baseline, loss.difference) == ("worse", 16, "random", -0.2)
    # 1 of 102 up, 21 of 102 down: -0.19608 -+ 1.96 sqrt((0.21569 - 0.19608^2) / 102)
    assert loss.interval == pytest.approx((-0.27778, -0.11438), abs=1e-4)
    assert loss_lines(results).splitlines() == [
        "Loses to `random` (difference in points, 95% interval):",
        "",
        "- worse at 16 tokens (12): -20.0 (-27.8 to -11.4)",
    ]
    assert "| worse | 0.500 (0.404 to 0.596); 12; 10% |" in table(results)


def test_no_loss_is_said_too():
    results = [Result("none", 144, "144", 1.0, (True,) * 100, 1.0), result("a", 70), result("resize", 70)]
    assert "Loses to `resize` (difference in points, 95% interval): nothing." in loss_lines(results)
