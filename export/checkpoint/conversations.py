"""The prompt forms of LLaVA's original code, as Jinja chat templates.

Checkpoints in the original format have no chat template: their code knows the forms by name. The names,
system sentences and separators are those of llava/conversation.py in haotian-liu/LLaVA and
LLaVA-VL/LLaVA-NeXT. A system message replaces the sentence of a form. Images and videos come first in their
turn, each on a line.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from string import Template

import tokenizers

from visprune.names import lookup

__all__ = ["CONVERSATIONS", "Conversation", "choose", "conversation_template", "image_text"]

# What is filled in are Jinja expressions, and the hyphens remove all white space of this source.
_TEMPLATE = """\
{%- macro said(message) -%}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content if part.type != 'text' -%}{{- image -}}{%- endfor -%}
    {%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
  {%- set system = said(messages[0]) -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = $sentence -%}
  {%- set turns = messages -%}
{%- endif -%}
{{- $begin -}}
{%- for message in turns -%}
  {%- set text = said(message) -%}
  {%- if message.role == 'user' -%}
    {{- $user -}}
  {%- elif message.role == 'assistant' -%}
    {{- $answer -}}
  {%- else -%}
    {{- raise_exception("only a first turn of the system, and turns of user and assistant are known") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- $ask -}}
{%- endif -%}
"""
_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_HONEST = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt form.

    Attributes:
        name: Its name in LLaVA's code.
        template: Source of its chat template, in which `image` is the text that stands for one image.
        says: The models that were trained with it.
    """

    name: str
    template: str
    says: str


def _form(
    name: str, says: str, sentence: str = "", *, begin: str, user: str, answer: str, ask: str
) -> Conversation:
    """Return a prompt form.

    Args:
        name: As for `Conversation`.
        says: As for `Conversation`.
        sentence: Text of the system for conversations that do not begin with a system message.
        begin: Jinja expression of the text before the first turn; it may name `system`.
        user: Expression of a turn of the user; it may name `text`, `system` and `loop.first`.
        answer: Expression of an answer; it may name `text`.
        ask: Expression of the text after which the model answers.
    """
    filled = Template(_TEMPLATE).substitute(
        sentence=json.dumps(sentence), begin=begin, user=user, answer=answer, ask=ask
    )
    return Conversation(name, filled, says)


def _vicuna(name: str, says: str, sentence: str) -> Conversation:
    return _form(
        name,
        says,
        sentence,
        begin="system ~ ' '",
        user="'USER: ' ~ text ~ ' '",
        answer="'ASSISTANT: ' ~ text ~ '</s>'",
        ask="'ASSISTANT:'",
    )


def _llama_2(name: str, says: str, sentence: str = "", start: str = "") -> Conversation:
    """Return a form of Llama 2; its turns of the user begin with `start`, the first excepted."""
    told = r"('<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' if loop.first and system else '')"
    return _form(
        name,
        says,
        sentence,
        begin="''",
        user=f"('' if loop.first else '{start}') ~ '[INST] ' ~ {told} ~ text ~ ' [/INST]'",
        answer="' ' ~ text ~ ' </s>'",
        ask="''",
    )


def _chatml(name: str, says: str, sentence: str, end: str) -> Conversation:
    """Return a form of ChatML; `end` is the expression of what follows each turn."""
    return _form(
        name,
        says,
        sentence,
        begin=rf"'<|im_start|>system\n' ~ system ~ {end}",
        user=rf"'<|im_start|>user\n' ~ text ~ {end}",
        answer=rf"'<|im_start|>assistant\n' ~ text ~ {end}",
        ask=r"'<|im_start|>assistant\n'",
    )


_FORMS = (
    _vicuna("vicuna_v1", "LLaVA 1.5 and 1.6 with Vicuna, LLaVA-HR", _HUMAN.replace("human", "user")),
    _vicuna("llava_v1", "the same models, in LLaVA's own command line", _HUMAN),
    _form(
        "llava_v0",
        "the first LLaVA",
        _HUMAN,
        begin="system ~ '###'",
        user="'Human: ' ~ text ~ '###'",
        answer="'Assistant: ' ~ text ~ '###'",
        ask="'Assistant:'",
    ),
    _llama_2("llava_llama_2", "LLaVA with Llama 2 Chat", _HELPFUL, "<s>"),
    _llama_2("mistral_instruct", "LLaVA 1.6 with Mistral"),
    _form(
        "llava_llama_3",
        "LLaVA-NeXT with Llama 3",
        _HELPFUL,
        # Llama 3's template writes the token that begins a text; the other forms leave it to the tokenizer.
        begin=r"bos_token ~ '<|start_header_id|>system<|end_header_id|>\n\n' ~ system | trim ~ '<|eot_id|>'",
        user=r"'<|start_header_id|>user<|end_header_id|>\n\n' ~ text | trim ~ '<|eot_id|>'",
        answer=r"'<|start_header_id|>assistant<|end_header_id|>\n\n' ~ text | trim ~ '<|eot_id|>'",
        ask=r"'<|start_header_id|>assistant<|end_header_id|>\n\n'",
    ),
    _chatml("qwen", "LLaVA-NeXT and OneVision with Qwen", "You are a helpful assistant.", r"'<|im_end|>\n'"),
    _chatml("chatml_direct", "LLaVA 1.6 with Yi-34B", "Answer the questions.", "'<|im_end|>'"),
    _chatml("mpt", "LLaVA with MPT", _HONEST, "'<|im_end|>'"),
    _form(
        "plain",
        "projectors before they are tuned on conversations",
        begin="system",
        user=r"text ~ '\n'",
        answer=r"text ~ '\n'",
        ask="''",
    ),
)
_BY_NAME = {form.name: form for form in _FORMS}
CONVERSATIONS = _BY_NAME | {"v1": _BY_NAME["vicuna_v1"], "qwen_1_5": _BY_NAME["qwen"]}
"""The prompt forms by their names, and by the other names that LLaVA's code has for two of them."""


def conversation_template(name: str, *, image: str) -> str:
    """Return the source of a form's chat template.

    Args:
        name: A key of `CONVERSATIONS`.
        image: Text that stands for one image or video, with the white space after it (see `image_text`).

    Raises:
        UsageError: There is no such form.
    """
    form = lookup(name, CONVERSATIONS, "conversation form")
    return f"{{%- set image = {json.dumps(image)} -%}}\n{form.template}"


def choose(model_type: str, special_tokens: Collection[str]) -> str:
    """Return the name of the form that a checkpoint of the original format was most likely trained with.

    Args:
        model_type: The `model_type` of its config.json.
        special_tokens: Texts of its tokenizer's special tokens.
    """
    if model_type == "llava_mistral":
        return "mistral_instruct"
    if model_type == "llava_qwen":
        return "qwen"
    if "<|start_header_id|>" in special_tokens:
        return "llava_llama_3"
    return "chatml_direct" if "<|im_start|>" in special_tokens else "vicuna_v1"


def image_text(backend: tokenizers.Tokenizer, image_token: str) -> str | None:
    """Return the text that stands for one image, such that prompts have the tokens of LLaVA's code.

    None if no text does, as when the tokenizer takes white space around an image for a part of its token.

    LLaVA's code splits a prompt at the images and encodes each piece by itself. SentencePiece puts a "▁" in
    front of every piece, and so of the newline after an image. Some tokenizers do that only at the beginning
    of a whole text; with them a space in front of the newline has the same effect. The two are told apart by
    encoding a prompt with two images as a whole and in pieces.

    What follows "</s>" in a later turn is left to the tokenizer. LLaVA's code puts a "▁" there only if
    `legacy` in tokenizer_config.json says so, and so does what `read_tokenizer` makes of a tokenizer.model
    like Llama's. A tokenizer.json may do otherwise. This was compared with the rules of the LlamaTokenizer of
    transformers 4, which LLaVA's code loads.

    Args:
        backend: The tokenizer, which knows the image token.
        image_token: Text of the image placeholder.
    """
    pieces = ("USER: ", "\n", "\nWhat is this? ASSISTANT:")
    encoded = [backend.encode(piece, add_special_tokens=False).ids for piece in pieces]
    placeholder = backend.encode(image_token, add_special_tokens=False).ids
    want = [*encoded[0], *placeholder, *encoded[1], *placeholder, *encoded[2]]
    for text in (f"{image_token}\n", f"{image_token} \n"):
        prompt = f"{pieces[0]}{text}{text}{pieces[2].lstrip()}"
        if backend.encode(prompt, add_special_tokens=False).ids == want:
            return text
    return None
