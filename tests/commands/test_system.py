"""A system prompt, and stops, in the commands that ask a model."""

import io
import json
import sys

import pytest

from visprune import cli

DROPS = (
    "{% for m in messages if m.role != 'system' %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %};{% endfor %}"
)


@pytest.fixture
def files(tmp_path, picture, monkeypatch):
    """A picture and a question about it, in an empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    picture(0).save("cat.png")
    line = {"image": "cat.png", "question": "What?", "answers": ["x"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")


@pytest.fixture
def call(files, capfd, monkeypatch):
    def run(verb, bundle, *options, lines=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        asked = {
            "run": ["-p", "What?", "-i", "cat.png"],
            "chat": ["-i", "cat.png"],
            "eval": ["--data", "q.jsonl", "--processes", "1"],
            "bench": ["-p", "What?", "-i", "cat.png", "--threads", "1", "--json", "r.json"],
        }[verb]
        code = cli.run_command(verb, [str(bundle), *asked, "--max-new-tokens", "2", *options])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("verb", ["run", "chat", "eval", "bench"])
@pytest.mark.parametrize(
    ("text", "template", "what"),
    [
        ("Be brief.", DROPS, "cannot show a system prompt"),
        (" ", None, "The system prompt is empty."),
        ("an <image>", None, "The system prompt contains '<image>'"),
        ("\udcff", None, "The system prompt is not valid UTF-8."),
    ],
)
def test_refused_before_anything_is_computed(
    call, verb, text, template, what, tiny_copy, edit_manifest, monkeypatch
):
    def loads(*_, **__):
        raise AssertionError("something was loaded")

    if template:
        (tiny_copy / "other.jinja").write_text(template, encoding="utf-8")
        edit_manifest(tiny_copy, "text", chat_template="other.jinja")
    for name in (
        "runtime.loading.verify_files",
        "bench.comparison.verify",
        "evaluation.evaluator.verify",
    ):
        monkeypatch.setattr(f"visprune.{name}", loads)
    code, out, err = call(verb, tiny_copy, "--system", text)
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert second.startswith("  ")


def test_run_and_chat(call, tiny_bundle):
    plain = json.loads(call("run", tiny_bundle, "--json")[1])
    answer = json.loads(call("run", tiny_bundle, "--json", "--system", "Be brief.")[1])
    assert answer["tokens_in"] == plain["tokens_in"] + len("system: Be brief.;")
    lines = ["What?", "And?", "/reset", "What?"]
    _, out, _ = call("chat", tiny_bundle, "--json", "--system", "Be brief.", lines=lines)
    first, later, again = [json.loads(line) for line in out.splitlines()]
    assert first["token_ids"] == again["token_ids"] == answer["token_ids"]
    assert first["tokens_in"] == again["tokens_in"] == answer["tokens_in"] < later["tokens_in"]


def test_eval_does_not_mix_answers(call, tiny_bundle):
    begun = "error: q-answers.jsonl was begun with system"
    assert call("eval", tiny_bundle, "--system", "Be brief.")[0] == 0
    assert call("eval", tiny_bundle, "--system", "Be brief.")[0] == 0
    assert call("eval", tiny_bundle)[2].startswith(f"{begun} 'Be brief.', and now it is None.")
    assert call("eval", tiny_bundle, "--system", "Shout.")[2].startswith(f"{begun} 'Be brief.', and now")
    assert call("eval", tiny_bundle, "--force")[0] == 0
    assert call("eval", tiny_bundle, "--system", "Be brief.")[2].startswith(f"{begun} None, and now it is")


def test_bench(call, tiny_bundle, tmp_path):
    assert call("bench", tiny_bundle, "--system", "Be <brief>.", "--html", "r.html")[0] == 0
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["work"]["system"] == "Be <brief>."
    text = "system: Be <brief>.;user: What?;a:"  # after a token that begins it; each letter is one
    assert {row["text_tokens"] for row in report["rows"]} == {1 + len(text)}
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "“What?”, after the system prompt “Be &lt;brief&gt;.”; 2 new tokens" in page


def test_stops(call, tiny_bundle):
    whole = json.loads(call("run", tiny_bundle, "--json")[1])["text"]
    _, out, _ = call("chat", tiny_bundle, "--json", "--stop", whole[1], lines=["What?"])
    assert json.loads(out)["text"] == whole[: whole.index(whole[1])]
    for verb in ("run", "chat"):
        code, out, err = call(verb, tiny_bundle, "--stop", "<eos>\n")
        assert (code, out) == (2, "")
        assert err.startswith("error: The stop '<eos>\\n' can never match")
