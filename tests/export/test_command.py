"""`visprune-export` as a person or a script runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from visprune.cli import run_command


@pytest.fixture(scope="module")
def model(checkpoint):
    return str(checkpoint(checkpoint.Tiny()))


def test_prints_graphs_parity_and_counts(model, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert run_command("export", [model, "--method", "fopru-row", "--ratio", "0.25", "-o", str(out)]) == 0
    printed = capsys.readouterr()
    for words in ("vision_encoder", "decoder_model_merged", "greedy tokens", "8 of 8 equal", str(out)):
        assert words in printed.out
    assert "kept 4 of 16 visual tokens, 75% removed" in printed.out
    assert "tracing the graphs" in printed.err
    assert "This export should take under a minute." in printed.err
    assert re.fullmatch(r"This took \d+ seconds\.", printed.err.splitlines()[-1])
    kept, work, wrote, compared, empty, *tables = printed.out.splitlines()
    assert kept.startswith("kept 4 of 16")
    assert work.startswith("work: ")
    assert re.fullmatch(rf"wrote {re.escape(str(out))} \(\S+ [kM]B; onnxruntime, float32\)", wrote)
    rows = json.loads((out / "visprune.json").read_text())["parity"]["rows"]
    worst = max(rows, key=lambda row: row["difference"] / row["tolerance"] if row["tolerance"] else 0)
    figures = f"{worst['difference']:.2g} of {worst['tolerance']:.2g} allowed"
    assert compared == f"compared with PyTorch: all {len(rows)} agree (largest difference {figures})"
    assert empty == ""
    assert tables[0].split() == ["graph", "size"]
    assert (out / "visprune.json").is_file()


def test_json_is_alone_on_stdout(model, tmp_path, capsys):
    arguments = [model, "--method", "random", "--keep-tokens", "5", "--no-verify", "--json"]
    assert run_command("export", [*arguments, "-o", str(tmp_path / "bundle")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["visual_tokens"], facts["keep_tokens"], facts["method"]) == (16, 5, "random")
    manifest = json.loads((tmp_path / "bundle" / "visprune.json").read_text())
    assert manifest["pruning"]["options"] == {"seed": 0}
    assert facts["parity"] == {"verified": False, "rows": [], "scope": "whole"}


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["--method", "fopru-rov"], "fopru-rov", "fopru-row"),
        (["--method", "none", "--ratio", "1.5"], "outside (0, 1]", "fraction"),
        (["--method", "none", "--ratio", "0.5", "--keep-tokens", "3"], "Both", "one of them"),
        (["--method", "none", "--target", "jetpack"], "jetpack", "jetpack6"),
        (["--method", "none", "--ratio", "half"], "--ratio", "--help"),
        ([], "--method", "--help"),
    ],
)
def test_bad_options_are_two_sentences_and_exit_code_2(
    arguments, what, hint, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run_command("export", [model, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    error, advice = printed.err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert what in error
    assert hint in advice
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing(model, tmp_path):
    """A limit on file sizes stands for a full disk: writes past it fail as they do there."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from visprune.cli import run_command\n"
        f"sys.exit(run_command('export', [{model!r}, '--method', 'none', '-o', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "The disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_python_says_the_same(model, tmp_path):
    import visprune
    from visprune.pruning.random_draw import Random

    bundle = visprune.export(model, method=Random(7), keep_tokens=3, output=tmp_path / "out", verify=False)
    assert (bundle.manifest.pruning.method, bundle.manifest.pruning.options) == ("random", {"seed": 7})
    import visprune.export

    assert callable(visprune.export)
