"""Bundles and PyTorch are asked the same held-out questions, and judged alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import visprune
from visprune.demo import MODEL_DIR, answers
from visprune.demo.answers import right_answers
from visprune.demo.held_out import FIRST_TEST_SCENE, held_out, wilson

COUNT = 20


@pytest.fixture(scope="module")
def right(demo_bundle: Path) -> list[bool]:
    """Which questions the bundle answers right."""
    with visprune.load(demo_bundle) as pipeline:
        return right_answers(pipeline, *held_out(COUNT))


def test_fewer_questions_are_the_first_of_more():
    images, asked = held_out(3)
    more_images, more_asked = held_out(5)
    assert np.array_equal(images, more_images[:3])
    assert asked == more_asked[:3]


def test_a_bundle_answers_what_pytorch_answers(right):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from visprune.demo.evaluate import hold_out
    from visprune.demo.language import answered
    from visprune.demo.table_methods import METHODS

    model = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    data = hold_out(model, tokenizer, COUNT, FIRST_TEST_SCENE)
    kept = METHODS["uniform"](data, 15, np.random.default_rng(0))
    assert right == answered(model, tokenizer, kept.features, data.asked).tolist()
    assert 0 < sum(right) < COUNT


def test_the_command_tells_each_bundle_and_its_agreement_with_the_first(demo_bundle, right, tmp_path, capsys):
    file = tmp_path / "answers.json"
    asked = ["--questions", str(COUNT), "--processes", "1", "--json", str(file)]
    answers.main([str(demo_bundle), str(demo_bundle), *asked])
    low, high = wilson(sum(right), COUNT)
    exact = f"{sum(right) / COUNT:.4f} ({low:.4f} to {high:.4f})  {demo_bundle}"
    assert capsys.readouterr().out.splitlines() == [exact, f"{exact}  1.0000 as {demo_bundle}"]
    rows = json.loads(file.read_text())["rows"]
    assert [row["figures"][0]["value"] for row in rows] == [sum(right) / COUNT] * 2


def test_what_is_no_bundle_is_told_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit) as end:
        answers.main([str(tmp_path), "--questions", "1", "--processes", "1"])
    assert "\n" in str(end.value)
