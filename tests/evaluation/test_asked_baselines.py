"""`visprune-eval` asks random tokens and a smaller picture beside a bundle, and finds their answers again."""

from __future__ import annotations

import json
import tempfile

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from visprune import cli
from visprune.demo import MODEL_DIR, held_out

COUNT = 12


@pytest.fixture
def call(demo_bundle, tmp_path, monkeypatch, capfd):
    """A function that asks the demo bundle where its checkpoint is found: in the working directory."""
    held_out.main([str(tmp_path / "data"), "--questions", str(COUNT)])
    monkeypatch.chdir(MODEL_DIR.parent)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def run(*options):
        arguments = [demo_bundle, "--data", tmp_path / "data" / "questions.jsonl", "--max-new-tokens", 8]
        arguments += ["-o", tmp_path / "answers.jsonl", "--json", *options]
        assert cli.run_command("eval", [str(a) for a in arguments]) == 0
        assert list(temporary.iterdir()) == []
        out, err = capfd.readouterr()
        return json.loads(out), err

    return run


def test_baselines_are_asked_at_the_counts_of_a_bundle_and_found_again(call, demo_bundle):
    found, err = call("--processes", "2")
    rows = {row["asked"]["name"]: row for row in found["rows"]}
    assert list(rows) == [str(demo_bundle), "random 15 of 144, fp32", "resize 9 of 144, fp32"]
    assert [row["kept"] for row in rows.values()] == [15 / 144, 15 / 144, 9 / 144]
    assert all(row["questions"] == COUNT and not row["errors"] for row in rows.values())
    equal = rows[str(demo_bundle)]["equal_counts"]
    assert [one["name"] for one in equal] == list(rows)[1:]
    for one in equal:
        mine, theirs = (rows[name]["figures"][0]["value"] for name in (str(demo_bundle), one["name"]))
        assert one["difference"]["value"] == pytest.approx(mine - theirs)
        assert one["loses"] == (one["difference"]["high"] < 0)
    assert "not kept" in " ".join(found["notes"])
    asked = f"{3 * COUNT} questions to ask: {COUNT} each for {'; '.join(rows)}"
    assert asked in err.splitlines()

    again, err = call("--processes", "1")
    assert again == found
    assert "questions to ask" not in err
    alone, _ = call("--no-baselines")
    assert alone["rows"] == [{**found["rows"][0], "equal_counts": []}]
