"""A sweep makes what is missing, names what cannot be made, goes on where it was, and is refused early."""

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

from visprune.bench.sweep import FLOATS, SweepPlan, _claim, _Maker, sweep
from visprune.bundle import Bundle
from visprune.demo import MODEL_DIR
from visprune.errors import InputError, UsageError
from visprune.export.checkpoint.checkpoint import find
from visprune.runtime import load


@pytest.fixture(scope="module")
def model(checkpoint):
    return str(checkpoint(checkpoint.Tiny(layers=4)))


def made(said: list[str]) -> set[str]:
    return {text.removeprefix("making ") for text in said if text.startswith("making ")}


def test_a_sweep_goes_on_and_names_what_cannot_be_made(model, work, tmp_path):
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        said.append(what)

    output = tmp_path / "sweep"
    first = sweep(model, SweepPlan(("fastv",), (0.5,)), work, output, progress=progress)
    assert made(said) == {"none-fp32", "fastv-fp32", "random-fp32"}
    assert [row.role for row in first.report.rows] == ["unpruned", "given", "random"]
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
    assert made(said) == {f"{name}-int8-dynamic" for name in ("none", "fastv", "random")}
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
    monkeypatch.setattr(_Maker, "_once", lambda maker, name, kind, make: places.append(f"{name}-{kind}"))
    plan = SweepPlan(("fastv",), (0.5,), (width, "int8"))
    _Maker(None, find(None), plan, tmp_path, print).bundle("fastv", "int8")
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
    _claim(tmp_path / "own", found, None)
    _claim(tmp_path / "own", found, None)
    with pytest.raises(UsageError, match="with another calibration"):
        _claim(tmp_path / "own", found, samples)


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


def test_the_demo_is_asked_its_questions_once(tmp_path, work, monkeypatch):
    """One bundle at two ratios, against the judgement of the runtime itself; then nothing is asked again."""
    import visprune
    from visprune.bench.accuracy import demo_accuracy
    from visprune.bench.lineup import entry
    from visprune.demo.answers import exact_match
    from visprune.demo.held_out import held_out

    bundle = visprune.export(MODEL_DIR, method="uniform", output=tmp_path / "uniform", verify=False)
    entries = [entry("all", bundle, ratio=1.0), entry("few", bundle, ratio=0.1)]
    found = demo_accuracy(entries, tmp_path, lambda *_: None, questions=24)
    with load(bundle.path, threads=1) as pipeline:
        right = sum(exact_match(pipeline, *held_out(24)))
    assert (found["all"].right, found["all"].of) == (right, 24)
    assert found["few"].right < found["all"].right

    def no_pool(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr("visprune.bench.accuracy.ProcessPoolExecutor", no_pool)
    assert demo_accuracy(entries, tmp_path, lambda *_: None, questions=24) == found
    with pytest.raises(AssertionError, match="asked again"):
        demo_accuracy(entries, tmp_path, lambda *_: None, questions=24, system="Be brief.")
    (tmp_path / "few.json").write_text("{")
    with pytest.raises(AssertionError, match="asked again"):
        demo_accuracy(entries, tmp_path, lambda *_: None, questions=24)
    assert Bundle.open(bundle.path).manifest.source.model == "model"
