"""Chat templates against transformers' renderer, and what an untrusted template cannot do."""

import time

import pytest

from visprune.errors import BundleError, InputError
from visprune.runtime import chat_template
from visprune.runtime.chat_template import ChatTemplate
from visprune.runtime.messages import Message

LLAVA = """\
{% for message in messages %}
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}
{# the pictures first #}
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{% if message['role'] == 'assistant' %}
{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}
{% else %}{{ part['text'] + ' ' }}{% endif %}
{% endfor %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nAnswer briefly.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part.text | trim -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

MISTRAL = """\
{{ bos_token }}{% set state = namespace(turn=0) %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (state.turn % 2 == 0) %}
        {{- raise_exception('roles must take turns, beginning with the user') }}
    {%- endif %}
    {%- set state.turn = state.turn + 1 %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}{{ part['text'] }}{% continue %}{% endif %}
            {{- '<image>\\n' }}
        {%- endfor %}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'][0]['text'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA_3 = """\
{{- bos_token }}
{%- if pad_token is defined %}{{ 'padded' }}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<image>' }}{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

TEMPLATES = {"llava": LLAVA, "chatml": CHATML, "mistral": MISTRAL, "llama-3": LLAMA_3}

CONVERSATIONS = {
    "one image": [Message.blank("user", "What is <this>? 猫 & 'cat'", images=1)],
    "two images": [Message.blank("user", " What differs?\n", images=2)],
    "no image": [Message("user", "Hello")],
    "two turns": [
        Message.blank("user", "What is this?", images=1),
        Message("assistant", "A cat."),
        Message.blank("user", "And this?", images=1),
    ],
}


def as_transformers(messages):
    return [
        {"role": m.role, "content": [{"type": "image"}] * m.images + [{"type": "text", "text": m.text}]}
        for m in messages
    ]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_equals_transformers(source, messages, add_generation_prompt):
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[as_transformers(messages)],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert ChatTemplate(source, "<s>", "</s>").render(messages, add_generation_prompt) == expected[0]


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_equals_a_tokenizers_apply_chat_template(source):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<image>": 2}))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=source
    )
    ours = ChatTemplate(source, "<s>", "</s>")
    for messages in CONVERSATIONS.values():
        expected = tokenizer.apply_chat_template(
            as_transformers(messages), tokenize=False, add_generation_prompt=True
        )
        assert ours.render(messages) == expected


def test_a_known_rendering():
    rendered = ChatTemplate(LLAVA, "<s>", "</s>").render(CONVERSATIONS["two turns"])
    assert rendered == "USER: <image>\nWhat is this? ASSISTANT: A cat. USER: <image>\nAnd this? ASSISTANT:"


def test_a_missing_special_token_is_undefined_and_not_the_word_none():
    assert "None" not in ChatTemplate(MISTRAL, None, "</s>").render(CONVERSATIONS["one image"])


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}",
        "{% for m in messages %}{{ '[' + m.role + ']' + m['content'] }}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m['content'].strip() }}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
    ],
)
def test_templates_that_take_strings(source):
    rendered = ChatTemplate(source, None, None, image_token="<im>").render(
        [Message.blank("user", "Hi", images=2)]
    )
    assert rendered == "[user]<im>\n<im>\nHi"


def test_tojson_escapes_nothing():
    rendered = ChatTemplate("{{ '<a> & ü' | tojson }}{{ messages[0].content }}", None, None)
    assert rendered.render([Message("user", "Hi")]) == '"<a> & ü"Hi'


def test_without_a_template():
    plain = ChatTemplate(None, "<s>", "</s>")
    assert plain.render([Message.blank("user", "Hi", images=2)]) == "<image>\n<image>\nHi"
    two = [Message.blank("user", "Hi", images=1), Message("assistant", "Yes.")]
    assert plain.render(two, add_generation_prompt=False) == "<image>\nHi\nYes."


def test_a_conversation_the_template_refuses():
    with pytest.raises(InputError, match="roles must take turns"):
        ChatTemplate(MISTRAL, "<s>", "</s>").render([Message("assistant", "Hi")])
    with pytest.raises(InputError, match="empty"):
        ChatTemplate(LLAVA, "<s>", "</s>").render([])


def test_messages_are_checked():
    with pytest.raises(InputError, match="no role"):
        Message("", "Hi")
    with pytest.raises(InputError, match="-1 images"):
        Message.blank("user", "Hi", images=-1)


def test_a_syntax_error_names_its_line():
    with pytest.raises(BundleError, match="line 2"):
        ChatTemplate("{{ messages }}\n{% for %}", None, None)


@pytest.mark.parametrize("source", [f"{{{{ {'(' * 5000}1 }}}}", f"{{{{ {'9' * 6000} }}}}"])
def test_a_template_beyond_pythons_limits(source):
    with pytest.raises(BundleError, match="cannot be compiled"):
        ChatTemplate(source, None, None)


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ nothing.at.all }}", "{{ messages + 1 }}", "{% include 'x' %}"]
)
def test_a_template_that_fails(source):
    with pytest.raises(BundleError, match="fails on this conversation"):
        ChatTemplate(source, None, None).render([Message("user", "Hi")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'a' * 1000000000000 }}",
        "{{ 1000000000000 * [0] }}",
        "{{ '%0300000000d' % 1 }}",
        "{{ '%.300000000f' % 1 }}",
        "{{ '%-*d' % (300000000, 1) }}",
        "{{ ('%' ~ '9' * 5000 ~ 'd') % 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaa{% endfor %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_hostile_template_is_stopped_soon(source):
    started = time.monotonic()
    with pytest.raises(BundleError):
        ChatTemplate(source, None, None).render([Message("user", "Hi")])
    assert time.monotonic() - started < 30


def test_the_bound_on_the_output(monkeypatch):
    source = "{% for i in range(10) %}{{ i }}{% endfor %}"
    assert ChatTemplate(source, None, None).render([Message("user", "Hi")]) == "0123456789"
    monkeypatch.setattr(chat_template, "MAX_RENDERED", 9)
    with pytest.raises(BundleError, match="more than 9 characters"):
        ChatTemplate(source, None, None).render([Message("user", "Hi")])


def test_ordinary_products_work():
    assert ChatTemplate("{{ '=' * 3 }}{{ 2 * 3 }}", None, None).render([Message("user", "Hi")]) == "===6"


def test_ordinary_formats_work():
    source = "{{ '**%s** of %5.2f in 2024' % ('a', 1) }} {{ 7 % 4 }}"
    assert ChatTemplate(source, None, None).render([Message("user", "Hi")]) == "**a** of  1.00 in 2024 3"
