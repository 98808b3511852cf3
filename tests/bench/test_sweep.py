"""A sweep makes what is missing, names what cannot be made, continues an earlier one, is refused early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from visprune.bench.report.report import BenchReport
from visprune.bench.row_accuracy import _accuracy, row_accuracies
from visprune.bench.sweep import SweepPlan, _claimed, sweep
from visprune.bench.sweep_bundles import FLOATS, SweepBundles
from visprune.bundle import Bundle
from visprune.demo import MODEL_DIR
from visprune.errors import InputError, UsageError
from visprune.evaluation import evaluate, read_questions
from visprune.evaluation.intervals import wilson
from visprune.evaluation.summary import EvaluatedBundle, EvaluationRow, Figure
from visprune.evaluation.workers import Workers
from visprune.export.checkpoint.find import find
from visprune.records import from_json
from visprune.runtime import load


@pytest.fixture(scope="module")
def model(checkpoint):
    return str(checkpoint(checkpoint.Tiny(layers=4)))


def read(report: BenchReport) -> BenchReport:
    return from_json(BenchReport, json.loads(report.to_json()), "report")


def made(said: list[str]) -> set[str]:
    return {text.removeprefix("making ") for text in said if text.startswith("making ")}


def test_a_sweep_goes_on_and_names_what_cannot_be_made(model, work, tmp_path):
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        said.append(what)

    output = tmp_path / "sweep"
    first = sweep(model, SweepPlan(("fastv",), (0.5,)), work, output, progress=progress)
    assert made(said) == {"none-fp32", "fastv-fp32", "random-fp32", "resize-fp32"}
    assert [row.role for row in first.report.rows] == ["unpruned", "given", "random", "resize"]
    assert any("Accuracy was not measured" in note for note in first.report.notes)

    said.clear()
    found = sweep(
        model, SweepPlan(("fastv", "fitprune"), (0.5, 0.01)), work, output, progress=progress
    ).report
    assert made(said) == {"fitprune-0.5-fp32", "fitprune-0.01-fp32"}
    names = {row.name for row in found.rows}
    assert {"none, fp32", "fastv 50%, fp32", "fastv 1%, fp32", "fitprune 50%, fp32"} <= names
    assert [one.what for one in found.not_made] == ["fitprune 1%, fp32"]
    assert "cannot be reached" in found.not_made[0].reason
    assert all(len(row.repetitions) == work.rounds for row in found.rows)

    said.clear()
    plan = SweepPlan(("fastv",), (0.5,), ("fp32", "int8-dynamic"))
    found = sweep(model, plan, work, output, progress=progress).report
    assert made(said) == {f"{name}-int8-dynamic" for name in ("none", "fastv", "random", "resize")}
    assert {row.precision for row in found.rows} == {"fp32", "int8-dynamic"}

    said.clear()
    (output / "bundles" / "fastv-fp32" / "tokenizer.json").unlink()
    again = sweep(model, SweepPlan(("fastv",), (0.5,)), work, output, progress=progress).report
    assert made(said) == set()
    broken = next(one for one in again.not_made if one.what == "fastv 50%, fp32")
    assert "is not whole" in broken.reason
    assert "rm -r" in broken.reason


@pytest.mark.parametrize("width", FLOATS)
def test_what_is_quantized_of_each_float_has_a_place_of_its_own(width, monkeypatch, tmp_path):
    places = []
    monkeypatch.setattr(SweepBundles, "_once", lambda _, name, kind, make: places.append(f"{name}-{kind}"))
    bundles = SweepBundles(None, find(None), tmp_path, (width, "int8"), (0.5,), None, print)
    bundles.bundle("fastv", "int8")
    assert places == [f"fastv-{width}", {"fp32": "fastv-int8", "fp16": "fastv-int8-fp16"}[width]]


def test_another_directory_or_another_model_is_refused_and_left_alone(model, work, tmp_path, checkpoint):
    plan = SweepPlan(("fastv",), (0.5,))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(UsageError, match="is not a sweep"):
        sweep(model, plan, work, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    (tmp_path / "other").mkdir()
    facts = {"model": "other", "weights_sha256": "1" * 64}
    (tmp_path / "other" / "sweep.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="another model"):
        sweep(model, plan, work, tmp_path / "other")
    found = find(str(model))
    samples = tmp_path / "samples.jsonl"
    samples.write_text("{}")
    with _claimed(tmp_path / "own", found, None):
        pass
    with (
        _claimed(tmp_path / "own", found, None),
        pytest.raises(UsageError, match="Another run is writing"),
        _claimed(tmp_path / "own", found, None),
    ):
        pass
    with (
        pytest.raises(UsageError, match="with another calibration"),
        _claimed(tmp_path / "own", found, samples),
    ):
        pass


def test_quantizing_without_samples_is_refused_before_anything_is_made(model, work, tmp_path):
    with pytest.raises(UsageError, match="calibration"):
        sweep(model, SweepPlan(("fastv",), (0.5,), ("int8",)), work, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_system_prompt_that_cannot_be_shown_is_refused_before_anything_is_made(model, work, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(
        template.replace("in messages", "in messages if m.role == 'user'")
    )
    for place, system, words in (
        (copy, "Be brief.", "cannot show a system prompt"),
        (model, " ", "is empty"),
    ):
        with pytest.raises(InputError, match=words):
            sweep(str(place), SweepPlan(("fastv",), (0.5,)), replace(work, system=system), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"methods": ("fopru-rov",)}, UsageError, "fopru-rov"),
        ({"methods": ()}, UsageError, "no method"),
        ({"methods": ("random", "random")}, UsageError, "twice"),
        ({"ratios": (0.5, 1.5)}, UsageError, "1.5"),
        ({"ratios": (0.0,)}, UsageError, "outside"),
        ({"precisions": ("int9",)}, UsageError, "int9"),
    ],
)
def test_what_there_is_not_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        replace(SweepPlan(("random",), (0.5,)), **fields)


_SWEEP = """
import sys
from pathlib import Path
from visprune.bench.report.report import Workload
from visprune.bench.sweep import SweepPlan, sweep
work = Workload((sys.argv[2],), "What?", 2, 1, rounds=2)
sweep(None, SweepPlan(("random",), (0.5,)), work, Path(sys.argv[1]))
"""


def test_a_sweep_that_is_killed_leaves_nothing_half(tmp_path, work):
    output = tmp_path / "sweep"
    process = subprocess.Popen([sys.executable, "-c", _SWEEP, str(output), work.images[0]], env=os.environ)
    folder = output / "bundles"
    deadline = time.monotonic() + 120
    while not (folder.is_dir() and any(folder.glob(".visprune-partial-*/onnx/*"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in folder.iterdir():
        assert path.name.startswith(".visprune-partial-")


@pytest.fixture
def asked(tmp_path, picture):
    """A file of two questions with the answers of four people, and a third line that is not JSON."""
    picture(0).save(tmp_path / "a.png")
    lines = [
        json.dumps({"image": "a.png", "question": text, "answers": ["x", "y", "z", "x"]})
        for text in ("What is it?", "Which?")
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join([*lines, "{"]))
    return tmp_path / "questions.jsonl"


def test_a_sweep_asks_a_users_model_a_users_questions_and_goes_on(model, work, asked, tmp_path, monkeypatch):
    plan, output = SweepPlan(("uniform", "random"), (0.5,)), tmp_path / "sweep"
    found = sweep(model, plan, work, output, questions=read_questions(asked)).report
    names = ["none, fp32", "uniform 50%, fp32", "random 50%, fp32", "resize 25%, fp32"]
    assert [row.name for row in found.rows] == names
    for row in found.rows:
        assert (row.accuracy.right, row.accuracy.of) == (0, 2)
        assert (row.accuracy.low, row.accuracy.high) == wilson(0, 2)
        assert row.accuracy.questions == f"{asked}, exact match"
    assert any("could not be used; the first: Line 3 of" in note for note in found.notes)
    assert any(note.startswith("Answers were cut off at 16 tokens: none, fp32 (2)") for note in found.notes)
    assert read(found) == found

    (file,) = (output / "answers").iterdir()
    bundles = [output / "bundles" / name for name in ("none-fp32@1", "uniform-fp32@0.5")]
    alone = evaluate(bundles, asked, workers=Workers(1))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [line["tokens_kept"] for line in lines if "text" in line]
    assert kept == [16, 16, 8, 8, 8, 8, 4, 4]
    assert [row.kept for row in alone.rows] == [1.0, 0.5]

    def no_question(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr("visprune.evaluation.evaluator.open_workers", no_question)
    vqa = sweep(model, plan, work, output, questions=read_questions(asked, metric="vqa")).report
    for row in vqa.rows:
        assert (row.accuracy.right, row.accuracy.of) == (0.0, 2)
        assert row.accuracy.questions == f"{asked}, VQA accuracy (a mean of scores, bootstrap interval)"
    with pytest.raises(AssertionError, match="asked again"):
        sweep(model, plan, replace(work, system="Be brief."), output, questions=read_questions(asked))


def test_unusable_questions_are_refused_before_anything_is_made(model, work, asked, tmp_path):
    asked.write_text("{")
    with pytest.raises(InputError, match=r"Line 1 of .* is not JSON"):
        sweep(model, SweepPlan(("fastv",), (0.5,)), work, tmp_path / "new", questions=read_questions(asked))
    assert not (tmp_path / "new").exists()


def test_scores_between_right_and_wrong_keep_their_sum(tmp_path):
    figure = Figure("VQA accuracy", 0.65, 0.5, 0.8, "bootstrap")
    bundle = EvaluatedBundle("b", "m", unpruned=True)
    row = EvaluationRow(bundle, 2, 1.0, (figure,), None, None, 0, ())
    found = _accuracy(row, "some questions, VQA accuracy")
    assert (found.right, found.of, found.share) == (1.3, 2, 0.65)
    assert "mean of scores, bootstrap" in found.questions


def test_the_demo_is_asked_its_questions_once(tmp_path, work, monkeypatch):
    """One bundle at two ratios, against the judgement of the runtime itself; then nothing is asked again."""
    import visprune
    from visprune.bench.entries import entry
    from visprune.demo.answers import right_answers
    from visprune.demo.held_out import held_out, held_out_questions

    bundle = visprune.export(MODEL_DIR, method="uniform", output=tmp_path / "uniform", verify=False)
    entries = [entry("all", bundle, ratio=1.0), entry("few", bundle, keep_tokens=16)]
    options = (entries, held_out_questions(24), work, tmp_path / "answers", lambda *_: None)
    found, notes = row_accuracies(*options)
    with load(bundle.path, threads=1) as pipeline:
        right = sum(right_answers(pipeline, *held_out(24)))
    every, few = found
    assert (every.right, every.of) == (right, 24)
    assert few.right < every.right
    assert every.questions == "the first 24 held-out questions of the demo model, exact match"
    assert not notes

    def no_question(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr("visprune.evaluation.evaluator.open_workers", no_question)
    assert row_accuracies(*options) == (found, notes)
    monkeypatch.setattr("visprune.bench.row_accuracy.baseline_pairs", lambda _: [(1, 0)])
    assert row_accuracies(*options)[1][0].startswith("few loses to all: exact match differs by -0.")
    assert Bundle.open(bundle.path).manifest.source.model == "model"
