"""Refusals for requests that do not have the form of `requests`: one sentence about the first fault."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from visprune.serve.errors import Refusal

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["refusal_for"]

# Fields of OpenAI's API that this server does not have, and what it takes of them.
_UNSUPPORTED = {
    "annotations": "Leave it out.",
    "audio": "Leave it out: answers are texts.",
    "description": "Leave it out: the model does not see it. Describe the form in a message.",
    "detail": 'Leave it out, or send "auto": visprune.ratio says how many tokens of a picture are kept.',
    "frequency_penalty": "Leave it out, or send 0; repetition_penalty is there.",
    "function_call": "Leave it out: there are no functions.",
    "functions": "Leave them out: there are no functions.",
    "include_obfuscation": "Leave it out, or send false.",
    "logit_bias": "Leave it out.",
    "logprobs": "Leave it out, or send false.",
    "modalities": 'Leave it out, or send ["text"].',
    "moderation": "Leave it out.",
    "n": "Leave it out, or send 1, and ask again for another answer.",
    "name": "Leave it out: the chat template has only roles. Or put the name into the text.",
    "prediction": "Leave it out.",
    "presence_penalty": "Leave it out, or send 0; repetition_penalty is there.",
    "prompt_cache_options": "Leave it out: conversations are cached by themselves.",
    "prompt_cache_retention": "Leave it out: conversations are cached by themselves.",
    "reasoning_effort": 'Leave it out, or send "none".',
    "refusal": "Leave it out.",
    "service_tier": 'Leave it out, or send "auto".',
    "store": "Leave it out, or send false: nothing is stored.",
    "tool_calls": "Leave them out: there are no tools.",
    "tool_choice": 'Leave it out, or send "none": there are no tools.',
    "tools": "Leave them out: there are no tools.",
    "top_logprobs": "Leave it out.",
    "verbosity": "Leave it out.",
    "web_search_options": "Leave it out: nothing is looked up.",
}
_KINDS = {
    "role": "Use system, developer, user or assistant.",
    "messages": "Use text or image_url.",
    "response_format": "Use text, json_object or json_schema.",
}
_FOREIGN = {  # roles and types of OpenAI's API that this server does not have
    "role": ("tool", "function"),
    "type": ("file", "grammar", "input_audio", "python", "refusal", "video_url"),
}
# What to send, by pydantic's types of faults. In braces are the bounds that it tells.
_ADVICE = {
    "bool_type": "Send true or false.",
    "finite_number": "Send a finite number.",
    "float_type": "Send a number.",
    "greater_than": "Send a number above {gt}.",
    "greater_than_equal": "Send a number of at least {ge}.",
    "int_type": "Send a whole number.",
    "less_than": "Send a number below {lt}.",
    "less_than_equal": "Send a number of at most {le}.",
    "list_type": "Send a list.",
    "string_too_long": "Send at most {max_length} characters.",
    "string_too_short": "Send a text that is not empty.",
    "string_type": "Send a text.",
    "too_long": "Send at most {max_length}.",
}
_TEXTS = {"content": "parts", "stop": "texts"}  # fields that are a text or a list
_ELSE = "/docs lists the fields and their values."
_SHOWN = 60  # the most characters of a value in a message


def refusal_for(error: ValidationError, value: dict[str, Any]) -> Refusal:
    """Return the refusal for a request that pydantic refused.

    Args:
        error: All faults; the first one is told.
        value: The request.
    """
    fault = error.errors(include_url=False)[0]
    keys = _keys(fault)
    if fault["type"].startswith("union_tag"):
        return _wrong_kind(keys, fault)
    param = _path(keys)
    if fault["type"] == "string_unicode":  # of the name of a field
        message = "The name of a field is no valid Unicode. Leave it out; /docs lists the fields."
        return Refusal(400, "unknown_parameter", message, param or None)
    unsupported = next((key for key in keys if key in _UNSUPPORTED), None)
    own = keys[0] == "metadata" or keys[-2:] == ["json_schema", "name"]  # a name that is there
    if unsupported is not None and not own:
        message = f"{param} is not supported with {_show(fault['input'])}. {_UNSUPPORTED[str(unsupported)]}"
        return Refusal(400, "unsupported_parameter", message, param)
    if fault["type"] == "missing":
        return Refusal(400, "missing_parameter", f"{param} is missing. /docs shows a request.", param)
    if fault["type"] == "extra_forbidden":
        message = f"There is no field {param}. Leave it out; /docs lists the fields."
        return Refusal(400, "unknown_parameter", message, param)
    if fault["type"] in ("model_type", "dict_type"):
        return _no_object(keys, fault)
    message = f"{param} is {_show(fault['input'])}. {_advice(keys, fault)}"
    return Refusal(400, "invalid_value", message, param)


def _advice(keys: list[int | str], fault: ErrorDetails) -> str:
    """Return the sentence that says which value is taken."""
    if keys[0] == "messages" and keys[-1] == "type":  # of a part that is not the user's
        only = "Pictures are taken in messages of the role user. " if fault["input"] == "image_url" else ""
        return f'{only}Send parts of the type "text".'
    if fault["type"] == "string_type" and keys[-1] in _TEXTS and keys[0] != "metadata":
        return f"Send a text, or a list of {_TEXTS[keys[-1]]}."
    if fault["type"] == "too_short":
        return f"Send at least one {'message' if len(keys) == 1 else 'part'}."
    return _ADVICE.get(fault["type"], _ELSE).format(**fault.get("ctx", {}))


def _keys(fault: ErrorDetails) -> list[int | str]:
    """Return the place of a fault without our tags, which have a colon. A client's own name may have one."""
    place = fault["loc"]
    named = fault["type"] == "extra_forbidden" or place[:1] == ("metadata",)
    keys = [key for key in place[:-1] if isinstance(key, int) or ":" not in key]
    return [*keys, *(key for key in place[-1:] if named or isinstance(key, int) or ":" not in key)]


def _no_object(keys: list[int | str], fault: ErrorDetails) -> Refusal:
    message = f"{_path(keys)} is {_show(fault['input'])}. Send a JSON object."
    return Refusal(400, "invalid_value", message, _path(keys))


def _wrong_kind(keys: list[int | str], fault: ErrorDetails) -> Refusal:
    """Return the refusal of a message, a part or a format of which there is no such role or type."""
    given = fault["input"]
    key = "role" if keys[0] == "messages" and len(keys) == 2 else "type"
    if not isinstance(given, dict):
        return _no_object(keys, fault)
    param, kinds = _path([*keys, key]), _KINDS["role" if key == "role" else str(keys[0])]
    if key not in given:
        return Refusal(400, "missing_parameter", f"{param} is missing. {kinds}", param)
    foreign = given[key] in _FOREIGN[key]
    return Refusal(
        400,
        "unsupported_parameter" if foreign else "invalid_value",
        f"{param} is {_show(given[key])}, which is not supported. {kinds}",
        param,
    )


def _path(keys: list[int | str]) -> str:
    """Return the name of a place, such as messages[1].content[0].image_url.url."""
    text = ""
    for key in keys:
        if isinstance(key, str) and key.isidentifier():
            text += f".{key}" if text else key
        else:
            text += f"[{json.dumps(key)}]"
    return text[:200]


def _show(value: Any) -> str:
    if isinstance(value, (dict, list)):
        if not value:
            return "an empty object" if isinstance(value, dict) else "an empty list"
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
