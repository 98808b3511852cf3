"""Files of messages, and `visprune run --messages`."""

from __future__ import annotations

import json

import pytest

from visprune.cli import run_command
from visprune.errors import VispruneError
from visprune.runtime import Message, load
from visprune.runtime.message_files import read_messages

TALK = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Look:"},
            {"type": "image_url", "image_url": {"url": "scene.png"}},
            {"type": "text", "text": "What is the letter?"},
        ],
    },
    {"role": "assistant", "content": "It is"},
]


@pytest.fixture
def talk(tmp_path, scene):
    scene.save(tmp_path / "scene.png")
    (tmp_path / "talk.json").write_text(json.dumps(TALK))
    return tmp_path / "talk.json"


def test_the_file_is_the_conversation(talk, scene, demo_bundle, capsys):
    told = [
        Message("system", "Be brief."),
        Message("user", ["Look:", scene, "What is the letter?"]),
        Message("assistant", "It is"),
    ]
    assert read_messages(talk) == told
    with load(demo_bundle) as pipeline:
        wanted = pipeline.answer(pipeline.prepare(told, keep_tokens=20)).result
    arguments = [str(demo_bundle), "--messages", str(talk), "--keep-tokens", "20", "--json"]
    assert run_command("run", arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["token_ids"], found["text"]) == (list(wanted.token_ids), wanted.text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[", "not JSON"),
        ("{}", "no list of messages"),
        ("[]", "no list of messages"),
        ('["x"]', "Message 1 of .* no object"),
        ('[{"role": "user", "content": "x", "name": "n"}]', "Message 1 of .* no object"),
        ('[{"role": "user", "content": 3}]', "another form"),
        ('[{"role": 1, "content": "x"}]', "another form"),
        ('[{"role": "user", "content": [{"type": "audio"}]}]', "a part .* has another form"),
        (
            '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "no.png"}}]}]',
            "no picture",
        ),
        (
            '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]',
            "is a URL",
        ),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_files_that_are_no_conversation(tmp_path, text, what):
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(VispruneError, match=what):
        read_messages(file)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "There is no question"),
        (["-p", "x", "--messages", "TALK"], "Both --prompt and --messages"),
        (["--messages", "TALK", "--system", "x"], "Leave --image, --video and --system out"),
        (["--messages", "nowhere.json"], "cannot be read"),
    ],
)
def test_options_that_exclude_each_other(talk, demo_bundle, capsys, arguments, what):
    given = [str(talk) if argument == "TALK" else argument for argument in arguments]
    assert run_command("run", [str(demo_bundle), *given]) == 2
    assert what in capsys.readouterr().err
