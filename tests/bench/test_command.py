"""`visprune-bench` as a person or a script runs it."""

from __future__ import annotations

import base64
import errno
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from visprune.bench.report.report import read_report
from visprune.cli import run_command


@pytest.fixture
def picture_file(picture, tmp_path) -> str:
    path = tmp_path / "picture.png"
    picture(1).save(path)
    return str(path)


def test_a_comparison_writes_its_files(tiny_bundle, picture_file, tmp_path, capsys):
    content = base64.b64encode(Path(picture_file).read_bytes()).decode()
    picture_file = f"data:image/png;base64,{content}"
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    options = ["-i", picture_file, "-p", "What?", "--max-new-tokens", "2", "--threads", "1", *files]
    assert run_command("bench", [str(tiny_bundle), str(tiny_bundle), *options]) == 0
    printed = capsys.readouterr()
    for words in ("tiny (2)", "tiny at 100%", "99% interval", "not in the table: random, 4 of 16"):
        assert words in printed.out
    report = read_report(tmp_path / "r.json")
    assert (report.work.rounds, report.work.warm_up, len(report.rows[0].repetitions)) == (10, 2, 10)
    tiny, again = report.rows[1:]
    assert (tiny.name, again.name) == ("tiny", "tiny (2)")
    html = (tmp_path / "r.html").read_text()
    assert "data:image/jpeg;base64," in html
    assert '<p class="soft">a data: URL</p>' in html
    assert "tiny at 100%" in html
    assert sorted(p.name for p in tmp_path.glob("*r.*")) == ["r.html", "r.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "9"], "9 rounds are too few"),
        (["--rounds", "1001"], "1001 rounds are too many"),
        (["--threads", "0"], "0 threads"),
        (["--max-new-tokens", "1"], "1 new tokens"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--image", "http://host/cat.png"], "http://host/cat.png is a URL"),
        (["--prompt", ""], "empty"),
        (["--provider", "gpu"], "gpu"),
        (["--against", "jax"], "jax"),
        (["--json", "nowhere/r.json"], "no directory nowhere"),
        (["--html", "there.html"], "there.html exists"),
        (["--html", "."], "is a directory"),
        (["--html", "new", "--json", "./new"], "the same file"),
        (["--methods", "random"], "belong to a sweep"),
        (["-o", "new"], "belong to a sweep"),
        (["--data", "questions.jsonl"], "belong to a sweep"),
        (["--sweep", "-o", "new", "--metric", "vqa"], "belong to --data"),
        (["--sweep", "-o", "new", "--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--sweep", "-o", "new", "--data", "there.html", "--metric", "exakt"], "Did you mean 'exact'"),
        (["--sweep"], "one model"),
        (["--sweep", "-o", "new", "--methods", "fopru-rov"], "fopru-rov"),
        (["--sweep", "-o", "new", "--ratios", "half"], "no numbers"),
        (["--sweep", "-o", "new", "--ratios", "2"], "outside (0, 1]"),
        (["--sweep", "-o", "new", "--precisions", "int3"], "int3"),
        (["--sweep", "-o", "there.html"], "not a sweep"),
    ],
)
def test_what_cannot_be_is_refused_in_two_lines_before_anything_runs(
    arguments, words, tiny_bundle, somewhere_else, capsys, monkeypatch
):
    def nothing_starts(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr("visprune.bench.measure.measure.Worker", nothing_starts)
    (somewhere_else / "there.html").write_text("mine")
    given = [] if "-o" in arguments and "--sweep" in arguments else [str(tiny_bundle)]
    assert run_command("bench", [*given, *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    said = printed.err.strip().splitlines()
    assert len([line for line in said if not line.endswith("...")]) == 2
    assert [path.name for path in somewhere_else.iterdir()] == ["there.html"]
    assert (somewhere_else / "there.html").read_text() == "mine"


def test_more_tokens_than_a_row_has_room_for_are_refused(tiny_bundle, picture_file, somewhere_else, capsys):
    options = ["-i", picture_file, "-p", "What?", "--max-new-tokens", "100000", "--json", "r.json"]
    assert run_command("bench", [str(tiny_bundle), *options]) == 2
    said = capsys.readouterr().err
    assert "has room for" in said
    assert "Give --max-new-tokens" in said
    assert not list(somewhere_else.iterdir())


def test_engines_are_asked_for_without_processor_threads(tiny_bundle, picture_file, capsys):
    """The engines are missing, or the package that runs them."""
    assert run_command("bench", [str(tiny_bundle), "-i", picture_file, "--provider", "tensorrt"]) == 2
    said = capsys.readouterr().err
    assert "threads" not in said
    assert "visprune-export" in said or "pip install" in said


def test_no_bundle_and_what_is_no_bundle_are_refused(somewhere_else, capsys):
    assert run_command("bench", []) == 2
    assert "no bundle" in capsys.readouterr().err
    assert run_command("bench", [str(somewhere_else)]) == 2
    assert "visprune.json" in capsys.readouterr().err


def test_a_full_disk_leaves_the_earlier_file(tiny_bundle, picture_file, tmp_path, capsys, monkeypatch):
    file = tmp_path / "r.json"
    file.write_text("earlier")
    write_text = Path.write_text

    def full(path: Path, data: str, **options: str) -> int:
        if "partial" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_text(path, data, **options)

    monkeypatch.setattr(Path, "write_text", full)
    arguments = [
        "-i",
        picture_file,
        "--max-new-tokens",
        "2",
        "--threads",
        "1",
        "--json",
        str(file),
        "--force",
    ]
    assert run_command("bench", [str(tiny_bundle), *arguments]) == 2
    printed = capsys.readouterr()
    assert "No space left" in printed.err
    assert "tiny at 100%" in printed.out  # what was measured is not lost
    assert file.read_text() == "earlier"
    assert not list(tmp_path.glob(".visprune-*"))


def test_an_interrupted_run_ends_in_one_line_with_its_processes(
    tiny_bundle, picture_file, tmp_path, capsys, monkeypatch
):
    from visprune.bench.measure import measure

    started = []

    class Noted(measure.Worker):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            started.append(self)

        def repeat(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(measure, "Worker", Noted)
    arguments = ["-i", picture_file, "--json", str(tmp_path / "r.json")]
    assert run_command("bench", [str(tiny_bundle), *arguments]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped."
    assert started
    assert all(worker._process.poll() is not None for worker in started)
    assert not (tmp_path / "r.json").exists()
