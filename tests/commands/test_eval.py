"""`visprune-eval`: what it prints, and what it says where it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import visprune
from visprune import cli


@pytest.fixture
def call(capfd):
    def run(*arguments):
        code = cli.run_command("eval", [str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def data(tmp_path, picture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(0).save(tmp_path / "a.png")
    good = {"image": "a.png", "question": "What?", "answers": ["x"]}
    lines = [json.dumps({**good, "question": f"What is {number}?"}) for number in range(6)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([*lines[:3], "{", *lines[3:]]) + "\n", encoding="utf-8")
    return path


def test_a_table(call, data, tiny_bundle):
    code, out, err = call(
        tiny_bundle, f"{tiny_bundle}@1", "--data", data, "--processes", 1, "--max-new-tokens", 3
    )
    assert code == 0
    assert f"skipped: Line 4 of {data} is not JSON." in err
    head, pruned, unpruned, *rest = out.splitlines()
    assert head.split() == ["bundle", "kept", "questions", "exact", "match"]
    assert pruned.split()[1:3] == ["25.0%", "6"]
    assert unpruned.split()[1:3] == ["100.0%", "6"]
    assert any(line.startswith(f"against {tiny_bundle}@1") for line in rest)
    assert f"6 questions of {data}, 1 skipped" in rest
    assert "in brackets: 95% intervals (Wilson; paired, Bonett and Price)" in rest
    assert rest[-1] == "answers in questions-answers.jsonl"


def test_json(call, data, tiny_bundle):
    code, out, _ = call(tiny_bundle, "--data", data, "-o", "x.jsonl", "--json", "--processes", 1)
    found = json.loads(out)
    assert code == 0
    assert (found["answers"], found["questions"], len(found["skipped"])) == ("x.jsonl", 6, 1)
    figure = found["rows"][0]["figures"][0]
    assert list(figure) == ["name", "value", "low", "high", "interval"]


def test_baselines_that_cannot_be_made_are_told_in_one_line(call, data, tiny_bundle):
    options = (tiny_bundle, f"{tiny_bundle}@1", "--data", data, "--processes", 1)
    _, out, err = call(*options)
    (line,) = [line for line in out.splitlines() if line.startswith("not in the table: ")]
    assert line.startswith(
        "not in the table: random, 4 of 16; resize, at most 4 of 16. The model of the bundle"
    )
    for method in ("random", "resize"):
        assert f"visprune-export MODEL --method {method} -o {method}" in line
    assert f"12 questions to ask: 6 each for {tiny_bundle}; {tiny_bundle}@1" in err
    _, out, err = call(*options, "--no-baselines")
    assert "not in the table" not in out
    assert "questions to ask" not in err  # they are answered


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--strict"], "Line 4 of"),
        (["--metric", "exac"], "no metric 'exac'"),
        (["--format", "popes"], "no format 'popes'"),
        (["--metric", "vqa"], "at least 4 people"),
        (["--metric", "choice"], "there are no choices"),
        (["--images", "elsewhere"], "no picture at"),
        (["--provider", "cudda"], "no provider"),
        (["--processes", "0"], "0 processes"),
        (["--threads", "0"], "0 threads"),
        (["--ray", "--processes", "2"], "Ray cluster"),
        (["-o", "missing/x.jsonl"], "cannot be written"),
    ],
)
def test_mistakes(call, data, tiny_bundle, options, what):
    before = sorted(data.parent.iterdir())
    code, out, err = call(tiny_bundle, "--data", data, *options)
    assert (code, out) == (2, "")
    first, second = [line for line in err.splitlines() if not line.startswith("skipped: ")]
    assert first.startswith("error: ")
    assert what in first
    assert second.startswith("  ")
    assert sorted(data.parent.iterdir()) == before


def test_data_that_holds_nothing(call, data, tiny_bundle):
    data.write_text("\n\n")
    assert "is empty" in call(tiny_bundle, "--data", data)[2]
    data.write_text('{"image": "a.png", "question": "What?"}\n')
    assert "has no 'answers'" in call(tiny_bundle, "--data", data)[2]


def test_ray_that_is_not_installed(call, data, tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = call(tiny_bundle, "--data", data, "--ray")
    assert code == 2
    assert 'pip install "visprune[distributed]"' in err


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_keeps_what_is_finished(data, tiny_bundle, processes):
    line = data.read_text().splitlines()[0]
    data.write_text("\n".join([line] * 3000) + "\n")
    command = [sys.executable, "-m", "visprune", "eval", str(tiny_bundle), "--data", str(data)]
    run = subprocess.Popen(
        [*command, "--processes", processes],
        env={**os.environ, "PYTHONPATH": str(Path(visprune.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    answers = data.parent / "questions-answers.jsonl"
    while not answers.exists() or answers.read_bytes().count(b"\n") < 10:
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    said, stopped = err.splitlines()[-2:]
    assert (
        said
        == f"The answers so far are in {answers.name}; the same command without --force continues from them."
    )
    assert stopped == "Stopped."
    assert "Traceback" not in err
    assert 10 <= answers.read_bytes().count(b"\n") < 3000
