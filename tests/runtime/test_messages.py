"""Messages as people send them: parts in order, all roles, an answer that is begun; with real templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from visprune.errors import InputError, UsageError
from visprune.runtime import Message, Video, load
from visprune.runtime.chat_template import ChatTemplate

transformers = pytest.importorskip("transformers")
from transformers.utils.chat_template_utils import render_jinja_template

PIXEL = Image.new("RGB", (2, 2))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMS = (
    "{% for m in messages %}[{{ m['role'] }}] {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %} [end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PARTS = [["Look: ", PIXEL, " and ", PIXEL, " differ how?"], [PIXEL, "What?"], ["What? ", PIXEL], ["Hello"]]


def listed(message):
    return {
        "role": message.role,
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in message.parts
        ],
    }


@pytest.mark.parametrize("source", [CHATML, TRIMS], ids=["chatml", "trims"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("begun", [None, "It is", "It is ", 'a "b" {'])
def test_parts_and_begun_answers_are_rendered_as_transformers_does(source, parts, begun):
    messages = [Message("system", "Be brief."), Message("user", parts)]
    messages += [] if begun is None else [Message("assistant", begun)]
    told = [listed(message) for message in messages]
    (wanted,), _ = render_jinja_template(
        [told],
        chat_template=source,
        add_generation_prompt=begun is None,
        continue_final_message=begun is not None,
    )
    template = ChatTemplate(source, None, None)
    assert (template.render(messages) if begun is None else template.render_begun(messages)) == wanted


def test_a_template_of_strings_gets_the_placeholders_in_their_places():
    strings = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '; ' }}{% endfor %}"
    template = ChatTemplate(strings, None, None)
    assert (
        template.render([Message("user", ["a", PIXEL, "b\n", PIXEL])]) == "user: a\n<image>\nb\n<image>\n; "
    )
    assert template.render([Message("user", [PIXEL, "b"])]) == "user: <image>\nb; "


def test_a_template_that_hides_answers_cannot_continue_one():
    hides = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
    with pytest.raises(InputError, match="does not show an answer that is begun"):
        ChatTemplate(hides, None, None).render_begun([Message("user", "q"), Message("assistant", "a")])


def test_parts_of_a_message(tmp_path):
    PIXEL.save(tmp_path / "a.png")
    message = Message("user", ["one", tmp_path / "a.png", "two", Video((PIXEL, PIXEL))])
    assert (message.text, message.images, message.videos) == ("one\ntwo", 1, 1)
    assert [type(part).__name__ for part in message.parts] == ["str", "Image", "str", "Video"]


@pytest.mark.parametrize(
    ("role", "parts", "what"),
    [
        ("", "x", "no role"),
        ("user", [Video((PIXEL,)), PIXEL], "follows a video"),
        ("user", [Path("/nowhere.png")], "no picture at"),
        ("user", [3], "given as int"),
    ],
)
def test_messages_that_cannot_be(role, parts, what):
    with pytest.raises(InputError, match=what):
        Message(role, parts)


@pytest.fixture(scope="module")
def demo(demo_bundle):
    with load(demo_bundle) as pipeline:
        yield pipeline


def test_an_answer_is_continued(demo, scene):
    asked = Message("user", [scene, "What is the letter?"])
    whole = demo.answer(demo.prepare([asked])).result
    tokens = [demo.loaded.tokenizer.decode([token]) for token in whole.token_ids]
    begun = demo.prepare([asked, Message("assistant", tokens[0])])
    rest = demo.answer(begun).result
    assert rest.token_ids == whole.token_ids[1:]
    assert tokens[0] + rest.text == whole.text


def test_the_chat_takes_messages_too(demo, scene):
    chat = demo.chat(system="Be brief.")
    first = chat.reply([Message("user", [scene, "What is the letter?"])], max_new_tokens=4).result
    told = [Message("system", "Be brief."), Message("user", [scene, "What is the letter?"])]
    assert first.token_ids == demo.answer(demo.prepare(told, max_new_tokens=4)).result.token_ids
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    again = chat.reply([Message("user", "q"), Message("assistant", "It is")], max_new_tokens=3).result
    assert chat.messages[-1].text == "It is" + again.text


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "empty"),
        ([Message("system", "x")], "ends with a message of the role 'system'"),
        ([Message("user", "x"), Message("assistant", "")], "ends with an empty answer"),
        ([Message("asistant", "x"), Message("user", "x")], "unknown role 'asistant'"),
        ([{"role": "user", "content": "q"}], "A message was given as dict"),
        ("hello", "A message was given as str"),
        ([Message("user", "")], "The prompt is empty"),
        ([Message("system", " "), Message("user", "x")], "The system prompt is empty"),
        ([Message("user", "a <image> b")], "stands for an image"),
        ([Message("user", ["<image>", PIXEL])], "stands for an image"),
        ([Message("system", [PIXEL]), Message("user", "x")], "picture|empty"),
        ([Message("assistant", [PIXEL, "x"])], "'assistant' has a picture"),
        ([Message("user", "bad \udcff")], "not valid UTF-8"),
    ],
)
def test_conversations_that_cannot_be(demo, messages, what):
    with pytest.raises(InputError, match=what):
        demo.prepare(messages)


def test_a_begun_answer_has_no_schema(demo):
    with pytest.raises(UsageError, match="begun cannot follow a JSON schema"):
        demo.prepare([Message("user", "x"), Message("assistant", "{")], schema={"type": "object"})


def test_an_answer_that_spells_the_placeholder_may_be_sent_back(demo):
    turn = demo.prepare([Message("user", "x"), Message("assistant", "a<image>b"), Message("user", "y")])
    assert turn.messages[1].text == "ab"
    assert json.dumps([message.role for message in turn.messages]) == '["user", "assistant", "user"]'
