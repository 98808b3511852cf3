"""Prompt forms of LLaVA's original checkpoints, as chat templates."""

from __future__ import annotations

from collections.abc import Collection

import tokenizers

__all__ = ["choose", "conversation_template", "image_text"]


def choose(model_type: str, special_tokens: Collection[str]) -> str:
    """Return the name of the form that a checkpoint was trained with."""
    if model_type in ("llava_mistral", "llava_qwen"):
        return {"llava_mistral": "mistral_instruct", "llava_qwen": "qwen"}[model_type]
    return "vicuna_v1"


def conversation_template(name: str, *, image: str) -> str:
    """Return the chat template of a form."""
    return (
        "{% for m in messages %}{{ m.role | upper }}: "
        "{% for c in m.content if c.type == 'image' %}" + image + "{% endfor %}"
        "{% for c in m.content if c.type == 'video' %}<video>\n{% endfor %}"
        "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def image_text(backend: tokenizers.Tokenizer, image_token: str) -> str:
    """Return the text that stands for one image."""
    return f"{image_token}\n"
