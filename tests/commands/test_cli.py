"""The command lines, as processes where that is what is tested, in this one otherwise."""

from __future__ import annotations

import base64
import builtins
import errno
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from visprune import __version__, cli
from visprune.errors import UsageError


@pytest.fixture
def call(capfd):
    """Run a verb in this process: (exit code, stdout, stderr)."""

    def run(verb, *arguments):
        code = cli.run_command(verb, [str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def cat(tmp_path, picture):
    path = tmp_path / "cat.png"
    picture(0).resize((90, 70)).save(path)
    return path


def process(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "visprune", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def interrupted_import():
    """What Python raises where Ctrl-C ended the beginning of a package in C."""
    error = ImportError("initialization failed")
    error.__cause__ = KeyboardInterrupt()
    return error


class TestHelp:
    def test_is_quick_and_light(self):
        code = (
            "import sys; from visprune.cli import run_command; run_command(None, ['--help']);"
            "heavy = {'numpy', 'onnxruntime', 'torch', 'transformers', 'PIL', 'onnx'} & set(sys.modules);"
            "sys.exit(f'imported {heavy}' if heavy else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for verb in cli.VERBS:
            assert verb in done.stdout

    @pytest.mark.parametrize("verb", cli.VERBS)
    def test_every_verb_has_an_example(self, call, verb):
        code, out, err = call(verb, "--help")
        assert (code, err) == (0, "")
        assert f"Usage: visprune-{verb}" in out
        assert "Example" in out

    def test_usage_of_the_umbrella(self, call):
        assert "Usage: visprune run" in call(None, "run", "--help")[1]

    def test_bare_umbrella_helps(self, call):
        code, out, _ = call(None)
        assert code == 0
        assert "Usage: visprune" in out

    def test_version(self, call):
        assert call(None, "--version") == (0, f"visprune {__version__}\n", "")

    def test_each_entry_point_names_its_verb(self, monkeypatch):
        asked = []
        monkeypatch.setattr(cli, "run_command", lambda verb, arguments: asked.append(verb) or 0)
        for verb in cli.VERBS:
            with pytest.raises(SystemExit):
                getattr(cli, f"{verb}_main")()
        with pytest.raises(SystemExit):
            cli.main()
        assert asked == [*cli.VERBS, None]

    def test_each_verb_has_a_script(self):
        project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
        scripts = re.findall(r'^(visprune\S*) = "visprune\.cli:(\w+)"$', project, re.MULTILINE)
        assert scripts == [
            ("visprune", "main"),
            *((f"visprune-{verb}", f"{verb}_main") for verb in cli.VERBS),
        ]
        with pytest.raises(AttributeError, match="rnu_main"):
            _ = cli.rnu_main


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            ([], "DIR"),
            (["--no-such-option"], "No such option"),
            (["x", "-p", "q", "--threads", "many"], "--threads"),
        ],
    )
    def test_usage_is_two_lines_and_exit_2(self, call, arguments, what):
        code, out, err = call("run", *arguments)
        assert (code, out) == (2, "")
        first, second = err.splitlines()
        assert first.startswith("error: ")
        assert what in first
        assert second == "  See: visprune-run --help"

    def test_unknown_verb(self, call):
        code, _, err = call(None, "rnu")
        assert code == 2
        assert "rnu" in err
        assert len(err.splitlines()) == 2

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["-p", ""], "The prompt is empty."),
            (["-p", "q", "--image", "/nowhere.png"], "no picture at"),
            (["-p", "q", "--image", "https://host/cat.png"], "https://host/cat.png is a URL, and pictures"),
            (["-p", "q", "--image", "data:image/png;base64,aGVsbG8"], "is not a picture in a known format"),
            (["-p", "q", "--image", "data:image/png;base64,?"], "is not base64"),
            (["-p", "q", "--video", "https://host/cat.gif"], "is a URL, and pictures are not downloaded"),
            (["-p", "q", "--ratio", "0"], "outside (0, 1]"),
            (["-p", "q", "--ratio", "nan"], "outside (0, 1]"),
            (["-p", "q", "--ratio", "0.5", "--keep-tokens", "3"], "Both"),
            (["-p", "q", "--provider", "cudda"], "no provider"),
            (["-p", "q", "--provider", "tensorrt"], "needs engines of TensorRT"),
            (["-p", "q", "--temperature", "-1"], "temperature"),
            (["-p", "q", "--top-k", "5"], "top_k has no effect"),
            (["-p", "q", "--seed", "5"], "seed has no effect"),
            (["-p", "q", "--ratio", "0.5"], "no picture"),
            (["-p", "q", "--keep-tokens", "4"], "no picture"),
            (["-p", "q", "--force"], "--force"),
            (["-p", "q", "--stop", ""], "A stop string is empty."),
            (["-p", "\udcff\udcfe"], "not valid UTF-8"),
            (["-p", "q", "--threads", "100000"], "100000 threads"),
            (["-p", "q", "--max-new-tokens", "0"], "Cannot generate 0"),
            (["-p", "q", "--threads", "0"], "0 threads"),
            (["-p", "x" * 400], "context"),
        ],
    )
    @pytest.mark.parametrize("json_too", [False, True])
    def test_bad_input(self, call, tiny_bundle, arguments, what, json_too):
        code, out, err = call("run", tiny_bundle, *arguments, *(["--json"] if json_too else []))
        assert (code, out) == (2, "")
        first, second = err.splitlines()
        assert first.startswith("error: ")
        assert what in first
        assert second.startswith("  ")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["-p", ""],
            ["-p", "<image>"],
            ["-p", "\udcff"],
            ["-p", "q", "--max-new-tokens", "0"],
            ["-p", "q", "--stop", ""],
        ],
    )
    def test_refused_before_anything_is_loaded(self, call, monkeypatch, tiny_bundle, arguments):
        monkeypatch.setattr("visprune.commands.run.open_pipeline", lambda *_: 1 / 0)
        assert call("run", tiny_bundle, *arguments)[0] == 2

    def test_a_prompt_of_other_bytes(self, tiny_bundle):
        done = process("run", tiny_bundle, "-p", "\udcff\udcfe")
        assert done.returncode == 2
        assert done.stderr.startswith("error: The prompt is not valid UTF-8.")

    def test_no_bundle(self, call, tmp_path):
        code, _, err = call("run", tmp_path, "-p", "q")
        assert code == 2
        assert "is not a bundle" in err

    @pytest.mark.parametrize(
        ("raised", "code", "said"),
        [
            (UsageError("What.", "Hint."), 2, "error: What.\n  Hint.\n"),
            (KeyboardInterrupt(), 130, "Stopped."),
            (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
            (interrupted_import(), 130, "Stopped."),
            (
                OSError(errno.ENOSPC, "No space left on device", "/x"),
                2,
                "error: No space left on device (/x).\n  Free",
            ),
            (
                PermissionError(errno.EACCES, "Permission denied", "/x"),
                2,
                "error: Permission denied (/x).\n  Choose",
            ),
        ],
    )
    def test_what_commands_raise(self, call, monkeypatch, raised, code, said):
        def fail(_):
            raise raised

        monkeypatch.setattr("visprune.commands.methods._row", fail)
        monkeypatch.setattr("os.dup2", lambda *_: None)
        got, out, err = call("methods")
        assert (got, out) == (code, "")
        assert err.startswith(said)
        assert bool(err) == bool(said)

    @pytest.mark.parametrize("closed", ["stdout", "stderr"])
    def test_a_stream_that_is_closed(self, closed):
        script = f"exec {sys.executable} -m visprune methods {'>' if closed == 'stdout' else '2>'}&-"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_bug_shows_itself(self, call, monkeypatch):
        monkeypatch.setattr("visprune.commands.methods._row", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("methods")

    def test_reader_that_goes_away(self, tiny_bundle):
        command = f"'{sys.executable}' -m visprune inspect '{tiny_bundle}' --json | head -c 1"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.stderr) == ("{", "")


class TestRun:
    def test_answers(self, call, tiny_bundle, cat):
        code, out, err = call("run", tiny_bundle, "--image", cat, "--prompt", "What?", "--max-new-tokens", 5)
        assert code == 0
        assert out.endswith("\n")
        first, second = err.splitlines()
        assert first == "kept 4 of 16 visual tokens, 75% removed"
        assert "vision_encoder" in second

    def test_json_is_the_generation(self, call, tiny_bundle, cat):
        code, out, err = call(
            "run", tiny_bundle, "-i", cat, "-i", cat, "-p", "What?", "--ratio", 0.5, "--json"
        )
        assert (code, err) == (0, "")
        answer = json.loads(out)
        assert list(answer) == [
            "text",
            "token_ids",
            "tokens_in",
            "tokens_kept",
            "visual_tokens",
            "keep_indices",
            "merged_indices",
            "layer_tokens",
            "finish_reason",
            "tokens_cached",
            "images_cached",
            "timings_ms",
        ]
        assert (answer["tokens_kept"], answer["visual_tokens"]) == (16, 32)
        assert [len(kept) for kept in answer["keep_indices"]] == [8, 8]

    def test_a_picture_in_a_data_url(self, call, tiny_bundle, cat):
        url = "data:image/png;base64," + base64.b64encode(cat.read_bytes()).decode()
        told = [call("run", tiny_bundle, "-i", i, "-p", "What?", "--max-new-tokens", 5) for i in (cat, url)]
        assert told[0][:2] == told[1][:2]
        assert told[0][0] == 0

    def test_text_only(self, call, tiny_bundle):
        code, _, err = call("run", tiny_bundle, "-p", "What?", "--max-new-tokens", 2)
        assert code == 0
        assert "kept" not in err

    def test_overlay(self, call, tiny_bundle, cat, tmp_path):
        target = tmp_path / "kept.png"
        arguments = ("run", tiny_bundle, "-i", cat, "-p", "q", "--max-new-tokens", 1, "--overlay", target)
        assert call(*arguments)[0] == 0
        before = target.read_bytes()
        assert Image.open(io.BytesIO(before)).width >= 480
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert "exists" in err
        assert call(*arguments, "--force", "--ratio", 1)[0] == 0
        assert target.read_bytes() != before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.png", "kept.png"]

    def test_overlay_leaves_the_files_beside_it(self, call, tiny_bundle, cat, tmp_path):
        mine = tmp_path / ".kept.part.png"
        mine.write_text("mine")
        options = ("-p", "q", "--max-new-tokens", 1, "--overlay", tmp_path / "kept.png")
        assert call("run", tiny_bundle, "-i", cat, *options)[0] == 0
        assert mine.read_text() == "mine"

    def test_overlays_of_several_images_are_numbered(self, call, tiny_bundle, cat, tmp_path):
        options = ("-p", "q", "--max-new-tokens", 1, "--overlay", tmp_path / "kept.png")
        assert call("run", tiny_bundle, "-i", cat, "-i", cat, *options)[0] == 0
        assert sorted(p.name for p in tmp_path.glob("kept*")) == ["kept-1.png", "kept-2.png"]

    @pytest.mark.parametrize("name", ["kept", "kept.xyz", "missing/kept.png"])
    def test_overlay_that_cannot_be_written(self, call, tiny_bundle, cat, tmp_path, name):
        code, out, _ = call("run", tiny_bundle, "-i", cat, "-p", "q", "--overlay", tmp_path / name)
        assert (code, out) == (2, "")
        assert [p.name for p in tmp_path.iterdir()] == ["cat.png"]

    def test_overlay_without_a_picture_or_a_grid(self, call, tiny_copy, edit_manifest, cat, tmp_path):
        overlay = ("--overlay", tmp_path / "kept.png")
        assert "needs a picture" in call("run", tiny_copy, "-p", "q", *overlay)[2]
        edit_manifest(tiny_copy, "pruning", grid=None)
        assert "not a grid" in call("run", tiny_copy, "-i", cat, "-p", "q", *overlay)[2]


class TestChat:
    @pytest.fixture
    def talk(self, call, monkeypatch):
        def run(lines, *arguments):
            monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
            return call("chat", *arguments)

        return run

    def test_one_json_line_a_turn(self, talk, tiny_bundle, cat):
        lines = ["hello", "", f"/image {cat}", "and this?", "/reset", "hello", "/quit", "never"]
        code, out, err = talk(lines, tiny_bundle, "-i", cat, "--json", "--max-new-tokens", 4)
        assert (code, err) == (0, "")
        turns = [json.loads(line) for line in out.splitlines()]
        assert [len(turn["keep_indices"]) for turn in turns] == [1, 1, 1]
        assert turns[0]["token_ids"] == turns[2]["token_ids"]
        assert turns[1]["tokens_in"] > turns[0]["tokens_in"]

    def test_plain(self, talk, tiny_bundle, cat):
        code, out, err = talk(["one", "two"], tiny_bundle, "-i", cat, "--max-new-tokens", 3)
        assert code == 0
        assert out.count("\n") >= 2
        assert "you>" not in out
        assert err.splitlines()[0] == "kept 4 of 16 visual tokens, 75% removed"

    def test_visual_tokens_are_told_when_there_is_a_picture(self, talk, tiny_bundle, cat):
        told = "kept 4 of 16 visual tokens, 75% removed"
        assert told not in talk(["one"], tiny_bundle, "--max-new-tokens", 1)[2]
        lines = ["one", f"/image {cat}", f"/image {cat}", "two"]
        err = talk(lines, tiny_bundle, "--max-new-tokens", 1)[2]
        assert err.count(told) == 1

    @pytest.mark.parametrize(
        ("errors", "what"), [("strict", "The input is"), ("surrogateescape", "The prompt is")]
    )
    def test_lines_that_are_no_text(self, call, monkeypatch, tiny_bundle, errors, what):
        lines = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", lines)
        code, out, err = call("chat", tiny_bundle, "--json")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {what} not valid UTF-8.\n")

    def test_limits_are_checked_before_anything_is_loaded(self, call, monkeypatch, tiny_bundle):
        monkeypatch.setattr("visprune.commands.chat.open_pipeline", lambda *_: 1 / 0)
        assert call("chat", tiny_bundle, "--max-new-tokens", 0)[0] == 2

    @pytest.mark.parametrize(
        ("line", "what"),
        [
            ("/image /nowhere.png", "There is no picture at /nowhere.png."),
            ("/image http://a/b.png", "http://a/b.png is a URL, and pictures are not downloaded."),
            (f"/image {__file__}", f"The picture {__file__} is not a picture in a known format."),
            ("/image", "/image has no path."),
            ("/foo", "There is no command '/foo'."),
            ("<image>", "The prompt contains '<image>', which stands for an image."),
        ],
    )
    def test_a_mistake_in_a_pipe_is_reported_and_the_talk_goes_on(self, talk, tiny_bundle, line, what):
        options = (tiny_bundle, "--json", "--max-new-tokens", 2)
        code, out, err = talk(["hello", line, "again"], *options)
        assert code == 2
        first, second = err.splitlines()
        assert first == f"error: {what}"
        assert second.startswith("  ")
        answers = [json.loads(one)["token_ids"] for one in out.splitlines()]
        code, out, _ = talk(["hello", "again"], *options)
        assert code == 0
        assert answers == [json.loads(one)["token_ids"] for one in out.splitlines()]

    def test_a_closed_stdin_is_an_empty_one(self, call, tiny_bundle, monkeypatch):
        monkeypatch.setattr(sys, "stdin", None)
        assert call("chat", tiny_bundle)[:2] == (0, "")

    def test_a_pipe_of_a_process_goes_on(self, tiny_bundle, cat):
        lines = f"/image /nowhere.png\n/image {cat}\nWhat?\n"
        done = process("chat", tiny_bundle, "--json", "--max-new-tokens", 2, input=lines)
        assert done.returncode == 2
        assert done.stderr == "error: There is no picture at /nowhere.png.\n  Check the path.\n"
        assert [len(json.loads(line)["keep_indices"]) for line in done.stdout.splitlines()] == [1]

    def test_help_lists_the_commands(self, talk, tiny_bundle):
        code, out, err = talk(["/help"], tiny_bundle, "--json")
        assert (code, out) == (0, "")
        listed = [line.split()[0] for line in err.splitlines() if line.startswith("/")]
        assert listed == ["/image", "/reset", "/quit", "/help"]

    def test_a_mistake_does_not_end_a_persons_talk(self, call, monkeypatch, tiny_bundle):
        lines = iter(["/foo", "hello", EOFError()])

        def answer(_):
            line = next(lines)
            if isinstance(line, Exception):
                raise line
            return line

        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
        monkeypatch.setattr(builtins, "input", answer)
        code, out, err = call("chat", tiny_bundle, "--json", "--max-new-tokens", 2)
        assert code == 0
        assert len(out.splitlines()) == 1
        assert "/foo" in err


def test_run_and_chat_share_their_options():
    from inspect import signature
    from typing import get_args

    from visprune.commands.chat import chat
    from visprune.commands.run import run

    ours, theirs = signature(run, eval_str=True).parameters, signature(chat, eval_str=True).parameters
    shared = ours.keys() & theirs.keys() - {"max_new_tokens", "as_json"}
    assert len(shared) == 14
    for name in shared:
        assert ours[name].default == theirs[name].default
        (our_type, our_option), (their_type, their_option) = (
            get_args(parameters[name].annotation) for parameters in (ours, theirs)
        )
        assert our_type == their_type
        assert vars(our_option) == vars(their_option)


class TestMethods:
    def test_table(self, call):
        code, out, _ = call("methods")
        assert code == 0
        for name in ("fastv", "fopru-rank", "fopru-row", "none", "random", "uniform"):
            assert name in out

    def test_json(self, call):
        rows = json.loads(call("methods", "--json")[1])
        assert {"name", "place", "about", "source"} == set(rows[0])
        places = {row["name"]: row["place"] for row in rows}
        assert set(places.values()) == {"before the encoder", "before the LLM", "inside the LLM"}
        assert {n for n, place in places.items() if place == "inside the LLM"} == {
            "fastv",
            "fitprune",
            "pyramiddrop",
            "sparsevlm",
        }

    def test_a_broken_plugin_hides_nothing(self, call, monkeypatch):
        monkeypatch.setattr(
            "visprune.pruning.registry._table",
            lambda: {"none": "visprune.pruning.keep_all:KeepAll", "x": "y:z"},
        )
        rows = {row["name"]: row for row in json.loads(call("methods", "--json")[1])}
        assert "cannot be loaded" in rows["x"]["about"]
        assert rows["none"]["place"] == "before the LLM"
        _, out, _ = call("methods")
        assert out.splitlines()[0] == "before the LLM"
        assert out.splitlines()[-2] == "not usable"
        assert out.splitlines()[-1].startswith("  x     cannot be loaded: ")

    def test_one_line_each_by_place(self, call, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        out = call("methods")[1]
        rows = json.loads(call("methods", "--json")[1])
        assert "…" not in out  # no description is cut
        blocks = [block.splitlines() for block in out.split("\n\n")]
        places = ["before the encoder", "before the LLM", "inside the LLM"]
        used = {row["place"] for row in rows}
        assert [block[0] for block in blocks] == [place for place in places if place in used]
        for place, *lines in blocks:
            mine = [row for row in rows if row["place"] == place]
            assert sorted(line.split()[0] for line in lines) == [row["name"] for row in mine]
            assert max(map(len, lines)) <= 100
            marked = [line.endswith("  baseline") for line in lines]
            assert marked == sorted(marked)
            assert sum(marked) == sum(row["source"].startswith("baseline") for row in mine)
        assert {line.split()[0] for line in out.splitlines() if line.endswith("  baseline")} >= {
            "none",
            "random",
            "uniform",
        }

    def test_a_method_of_somebody_else_stays_on_its_line(self, call, monkeypatch):
        class Theirs:
            """Keep whatever the author of this other package thinks is worth keeping, and a lot of it."""

            place = "beside the LLM"
            paper = "A paper with a very long title that no column has room for"

        monkeypatch.setattr("visprune.pruning.registry.load_method", lambda name: Theirs)
        monkeypatch.setattr("visprune.pruning.registry.method_names", lambda: ["theirs"])
        monkeypatch.setenv("COLUMNS", "80")
        place, line = call("methods")[1].splitlines()
        assert place == "beside the LLM"
        assert line.startswith("  theirs  Keep whatever the author")
        assert line.count("…") == 2
        assert len(line) <= 80

    def test_published_recipes(self, call):
        code, out, err = call("methods", "--recipes")
        assert (code, err) == (0, "")
        rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("llava-")}
        assert len(rows) == 14
        assert rows["llava-1.5-7b-20"][1:] == ["LLaVA-1.5-7B", "576", "26", "20%", "15.3%", "*"]
        assert rows["llava-next-7b-60"][1:] == ["LLaVA-NeXT-7B", "2880", "25", "60%", "60.3%"]
        marked = {name for name, words in rows.items() if words[-1] == "*"}
        assert marked == {"llava-1.5-7b-10", "llava-1.5-7b-20", "llava-1.5-7b-30"}
        assert "* removes less than its name says, by more than 2 percentage points" in out
        assert "arXiv 2409.10197" in out
        assert "--recipe published:NAME" in out
        assert max(map(len, out.splitlines())) <= 80

    def test_published_recipes_as_json(self, call):
        found = {row["name"]: row for row in json.loads(call("methods", "--recipes", "--json")[1])}
        twenty = found["llava-1.5-7b-20"]
        assert (twenty["model"], twenty["visual_tokens"], twenty["num_layers"]) == ("LLaVA-1.5-7B", 576, 32)
        assert sum(twenty["scheme"]) == 149
        assert twenty["prune_points"] == [layer for layer, count in enumerate(twenty["scheme"]) if count]
        assert (twenty["nominal_reduction"], round(twenty["true_reduction"], 4)) == (0.2, 0.1535)
        assert twenty["shortfall"].startswith("It removes 15.3%")
        assert found["llava-1.5-7b-60"]["shortfall"] is None

    def test_without_torch(self):
        code = (
            "import sys; from visprune.cli import run_command; code = run_command('methods', []);"
            "code = code or run_command('methods', ['--recipes']); sys.exit(code or 'torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


class TestInspect:
    def test_shows_the_bundle(self, call, tiny_bundle):
        code, out, err = call("inspect", tiny_bundle, "--verify")
        assert (code, err) == (0, "")
        for part in ("token_pruner", "kept 4 of 16 visual tokens, 75% removed", "vision_encoder", "hashes"):
            assert part in out

    def test_json(self, call, tiny_bundle):
        data = json.loads(call("inspect", tiny_bundle, "--json")[1])
        assert data["pruning"]["keep_tokens"] == 4
        assert data["verified"] is False

    def test_altered_file(self, call, tiny_copy):
        path = tiny_copy / "tokenizer.json"
        path.write_text(path.read_text().replace("<eos>", "<sos>"))
        assert call("inspect", tiny_copy)[0] == 0
        code, out, err = call("inspect", tiny_copy, "--verify")
        assert (code, out) == (2, "")
        assert "was altered" in err
