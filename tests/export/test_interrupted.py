"""Exports that are stopped or killed, as real processes: nothing half-written, and the next one says so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

# What an export prints as it begins each part.
STEPS = ("loading the checkpoint", "tracing the graphs", "writing token_pruner", "comparing with PyTorch")


@pytest.fixture(scope="module")
def model(checkpoint):
    return str(checkpoint(checkpoint.Tiny()))


def stopped(model, out, step, number):
    """Start an export, send it a signal when it begins a step: its exit code and what it printed."""
    arguments = ["-m", "visprune", "export", model, "--method", "fopru-rank", "-o", str(out)]
    with subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        printed = []
        for line in run.stderr:
            printed.append(line.rstrip())
            if line.startswith(step):
                run.send_signal(number)
                sent = time.monotonic()
        code = run.wait()
        assert time.monotonic() - sent < 30
    return code, printed


@pytest.mark.parametrize(
    ("step", "number"), [*((step, signal.SIGINT) for step in STEPS), (STEPS[1], signal.SIGTERM)]
)
def test_a_signal_ends_an_export_with_one_line_and_nothing_left(step, number, model, tmp_path):
    code, printed = stopped(model, tmp_path / "made" / "out", step, number)
    assert code == 128 + number, printed
    assert printed[-1] == "Stopped."
    assert "Traceback" not in "".join(printed)
    assert not list(tmp_path.iterdir())


def test_a_killed_export_is_cleared_by_the_next_which_says_so(model, tmp_path, capsys):
    from visprune.cli import run_command

    assert stopped(model, tmp_path / "out", STEPS[2], signal.SIGKILL)[0] == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    arguments = [model, "--method", "none", "--no-verify", "-o", str(tmp_path / "out")]
    assert run_command("export", arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(f"Removed {left.name}, left by an export that did not finish.") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
