"""A few cases of `scripts/fuzz`, which can run for hours; the seed is fixed, so they are always the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import KINDS, Manifests, run_case

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz"


def outcomes(kind, name, count):
    found = [run_case(kind, name, 1, number) for number in range(count)]
    failed = [(number, text) for number, (outcome, text) in enumerate(found) if outcome == "failed"]
    assert not failed, f"case {failed[0][0]} of {name}: {failed[0][1]}"
    return {outcome for outcome, _ in found}


def test_manifests(tiny_bundle, tmp_path):
    assert outcomes(Manifests(tmp_path, (tiny_bundle,)), "manifest", 60) == {"accepted", "refused"}


@pytest.mark.parametrize(("name", "count"), [("samples", 80), ("pictures", 150)])
def test_lines_and_pictures(name, count, tmp_path):
    assert outcomes(KINDS[name](tmp_path), name, count) == {"accepted", "refused"}


@pytest.mark.parametrize("name", ["recipe", "checkpoint"])
def test_what_an_export_reads(name, tmp_path):
    pytest.importorskip("torch")
    assert outcomes(KINDS[name](tmp_path), name, 5)


def test_a_case_comes_again(tmp_path):
    kind = KINDS["samples"](tmp_path)
    found = []
    for _ in range(2):
        run_case(kind, "samples", 3, 17)
        found.append((tmp_path / "lines.jsonl").read_bytes())
    run_case(kind, "samples", 3, 18)
    assert found[0] == found[1] != (tmp_path / "lines.jsonl").read_bytes()


def test_anything_but_a_sentence_is_a_failure():
    outcome, text = run_case(lambda draw: lambda: 1 / 0, "samples", 0, 0)
    assert outcome == "failed"
    assert "ZeroDivisionError" in text


def test_the_script_counts(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--kind",
        "samples",
        "--count",
        "5",
        "--output",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    words = done.stdout.split()
    assert words[0] == "samples"
    assert int(words[1]) + int(words[3]) == 5
    assert not (tmp_path / "x").exists()
