"""What a chat template can show, found by trying: pictures, a system prompt, the end of an answer."""

import time

import pytest

from visprune.errors import BundleError
from visprune.runtime.chat_template import ChatTemplate
from visprune.runtime.messages import Message

ANY, ONE_A_TURN = "any number of pictures", "exactly one picture in each turn of the user"

PARTS = (
    "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text + ' ' }}"
    "{% else %}{% if loop.first %}{{ 'A chat between a user and an assistant. ' }}{% endif %}"
    "{{ m.role.upper() + ': ' }}" + PARTS + "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] " + PARTS + " [/INST]{% else %}{{ m.content[0].text + eos_token }}"
    "{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' %}{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
JOY = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'user' %}<|before|><image><|after|>{% endif %}{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FIRST = (
    "{% for m in messages %}{% if loop.first %}<image>\n{% endif %}[{{ m.role }}]{{ m.content + ';' }}"
    "{% endfor %}"
)
AT_MOST_ONE = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content if p.type == 'image' %}"
    "{% if loop.first %}<image>{% endif %}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
REFUSES_TWO = AT_MOST_ONE.replace("{% if loop.first %}", "{% if not loop.first %}{{ 1 / 0 }}{% else %}")
BLIND = (
    "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
ALWAYS = "<image>" + CHATML
STRING_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<<' + m.content + '>>' }}{% else %}"
    "[{{ m.role }}]" + PARTS + "{% endif %}{% endfor %}"
)
PRINTS_SYSTEM = STRING_SYSTEM.replace("'<<' + m.content + '>>'", "m.content")
STRING_ANSWERS = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    + PARTS
    + "{% else %}{{ m.content }}{% endif %}|{% endfor %}"
)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]" + PARTS + "{% endfor %}"

CASES = {
    "no template": (None, (0, 1, 2), ANY, True, ""),
    "vicuna": (VICUNA, (0, 1, 2), ANY, True, "</s>"),
    "mistral": (MISTRAL, (0, 1, 2), ANY, False, "</s>"),
    "chatml": (CHATML, (0, 1, 2), ANY, True, "<|im_end|>\n"),
    "llama-3": (LLAMA_3, (0, 1, 2), ANY, True, "<|eot_id|>"),
    "joy": (JOY, (1, 1, 1), ONE_A_TURN, True, "<|eot_id|>"),
    "first": (FIRST, (1, 1, 1), "exactly one picture, in the first turn of the user alone", True, ";"),
    "at most one": (AT_MOST_ONE, (0, 1, 1), "at most one picture in a turn", True, ""),
    "refuses two": (REFUSES_TWO, (0, 1, 0), "at most one picture in a turn", True, ""),
    "blind": (BLIND, (0, 0, 0), "no pictures", True, ""),
    "always": (
        ALWAYS,
        (1, 2, 3),
        "1, 2 and 3 image tokens in turns with no, one and two pictures",
        True,
        "<|im_end|>\n",
    ),
    "string system": (STRING_SYSTEM, (0, 1, 2), ANY, True, ""),
    "prints system": (PRINTS_SYSTEM, (0, 1, 2), ANY, True, ""),
    "string answers": (STRING_ANSWERS, (0, 1, 2), ANY, True, "|"),
    "drops system": (DROPS_SYSTEM, (0, 1, 2), ANY, False, ""),
    "fails": ("{{ 1 / 0 }}", (0, 0, 0), "no pictures", False, ""),
    "says nothing": ("", (0, 0, 0), "no pictures", False, ""),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_a_template_can_show(case):
    source, shown, described, shows_system, turn_end = case
    template = ChatTemplate(source, "<s>", "</s>")
    assert template.shown == shown
    assert template.describe() == described
    assert template.shows_system is shows_system
    assert template.turn_end() == turn_end


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (VICUNA, "Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:"),
        (STRING_SYSTEM, "<<Be brief.>>[user]<image>\nWhat?[assistant]A cat.[user]Where?"),
        (PRINTS_SYSTEM, "Be brief.[user]<image>\nWhat?[assistant]A cat.[user]Where?"),
        (STRING_ANSWERS, "Be brief.|<image>\nWhat?|A cat.|Where?|"),
        (None, "Be brief.\n<image>\nWhat?\nA cat.\nWhere?"),
    ],
)
def test_each_role_in_the_form_that_it_takes(source, expected):
    turns = [
        Message.blank("user", "What?", images=1),
        Message("assistant", "A cat."),
        Message("user", "Where?"),
    ]
    rendered = ChatTemplate(source, "<s>", "</s>").render([Message("system", "Be brief."), *turns])
    assert rendered == expected


def test_a_template_that_writes_the_token_gets_the_text_alone():
    template = ChatTemplate(JOY.replace("<image>", "<|69|>"), "<s>", "</s>", image_token="<|69|>")
    rendered = template.render([Message.blank("user", " What? ", images=1)])
    assert rendered == (
        "<|start_header_id|>user<|end_header_id|>\n\n<|before|><|69|><|after|>What?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_video_in_a_string_has_a_placeholder():
    rendered = ChatTemplate(LLAMA_3, "", "").render([Message.blank("user", "What?", images=1, videos=1)])
    assert "<image>\n<image>\nWhat?" in rendered


def test_a_string_shows_two_pictures_where_a_list_shows_one():
    both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}" + PARTS.replace(
        "<image>\n", "{{ '<image>\n' if loop.first }}"
    )
    template = ChatTemplate(both + "{% endif %}{% endfor %}", None, None)
    assert template.shown == (0, 1, 2)
    assert template.render([Message.blank("user", "What?", images=2)]) == "<image>\n<image>\nWhat?"


def test_json_of_the_template_itself_is_no_printed_list():
    tools = '{{ \'{"type": "function"} \' }}'
    template = ChatTemplate(tools + CHATML, None, None)
    assert template.shown == (0, 1, 2)
    assert template.render([Message("user", "What?")]).startswith('{"type": "function"} <|im_start|>user')


def test_trying_a_hostile_template_ends_soon():
    source = "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaa{% endfor %}{% endfor %}"
    started = time.monotonic()
    template = ChatTemplate(source, None, None)
    assert (template.shown, template.shows_system, template.turn_end()) == ((0, 0, 0), False, "")
    with pytest.raises(BundleError, match="renders more"):
        template.render([Message("user", "Hi")])
    assert time.monotonic() - started < 60
