"""Text and image processing of a checkpoint: tokenizer, chat template, image and video processors.

All of it is read from the checkpoint's own files. Transformers' processors are not used, because the runtime
prepares text and images itself. Whether it can do so for this checkpoint is checked here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from visprune.errors import CheckpointError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.conversations import conversation_template, image_text
from visprune.export.checkpoint.template import (
    check_placeholders,
    define_role_tokens,
    extra_turn_ends,
    find_template,
    template_notes,
)
from visprune.export.checkpoint.tokenizer import CheckpointTokenizer, read_tokenizer
from visprune.export.files.small_files import (
    IMAGE_PROCESSOR,
    PROCESSOR_CONFIG,
    VIDEO_PROCESSOR,
)
from visprune.manifest import Text
from visprune.runtime.chat_template import ChatTemplate
from visprune.runtime.messages import Message
from visprune.runtime.text import Tokenizer

__all__ = ["IMAGE_PROCESSOR", "VIDEO_PROCESSOR", "Processor", "load_processor", "processor_files"]

# Classes of transformers by `model_type`: of the video processor, and of the image processor if a checkpoint
# names none.
_VIDEO_CLASSES = {
    "llava_next_video": "LlavaNextVideoVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
}
_IMAGE_CLASSES = {
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_next_video": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
    "vipllava": "CLIPImageProcessor",
}
_CLASS_KEYS = ("image_processor_type", "feature_extractor_type")


@dataclass(frozen=True, slots=True)
class Processor:
    """Text and image processing of a checkpoint.

    Attributes:
        json: Text of the bundle's `tokenizer.json`.
        tokenizer: The tokenizer that the runtime will make of it.
        template_source: Source of the chat template; None if the checkpoint has none.
        template: The chat template that the runtime will make of it.
        image_processor: Settings of the image processor, for the bundle's file.
        text: The manifest's entry for text.
        video_processor: Settings of the video processor; None if the model takes no videos.
        notes: Sentences that a user should read before using the bundle.
    """

    json: str
    tokenizer: Tokenizer
    template_source: str | None
    template: ChatTemplate
    image_processor: dict[str, Any]
    text: Text
    video_processor: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def load_processor(checkpoint: Checkpoint, config: Any) -> Processor:
    """Load tokenizer, chat template and image processor; check that they fit the model and each other.

    Args:
        checkpoint: The checkpoint.
        config: Its configuration.

    Raises:
        CheckpointError: One of them is missing or does not fit the model.
        BundleError: The template fails when it is rendered.
    """
    found = read_tokenizer(checkpoint)
    image_token_id = config.image_token_id
    image_token = _image_token(checkpoint, found, image_token_id)
    video_token_id = getattr(config, "video_token_id", None)
    video_token = _token(found, video_token_id)
    ends, notes = _eos_token_ids(checkpoint, config, found)
    if checkpoint.conversation is None:
        source = define_role_tokens(find_template(checkpoint), found.settings)
    else:
        image = image_text(found.backend, image_token)
        source = conversation_template(checkpoint.conversation, image=image or f"{image_token}\n")
        if image is None:
            notes += (
                f"The tokenizer treats the text around {image_token} otherwise than LLaVA's code, which may "
                "change answers.",
            )
    template = ChatTemplate(source, found.bos_token, found.eos_token, image_token)
    tokenizer = Tokenizer.from_backend(found.backend, image_token, image_token_id, found.bos_token, ends)
    check_placeholders(template, tokenizer)
    more = extra_turn_ends(template, tokenizer, ends)
    if more:
        name = found.backend.id_to_token(more[0])
        notes += (
            f"The chat template ends an answer with {name} ({more[0]}), which the checkpoint does not list "
            "as an end of text; the bundle does.",
        )
    return Processor(
        json=found.json,
        tokenizer=replace(tokenizer, eos_token_ids=ends + more),
        template_source=source,
        template=template,
        image_processor=_image_processor(checkpoint),
        text=Text(
            tokenizer="tokenizer.json",
            chat_template="chat_template.jinja" if source else None,
            image_token=image_token,
            image_token_id=image_token_id,
            bos_token=found.bos_token,
            eos_token=found.eos_token,
            video_token=video_token,
            video_token_id=video_token_id if video_token else None,
        ),
        video_processor=_video_processor(checkpoint) if video_token else None,
        notes=(
            *found.notes,
            *notes,
            *template_notes(source, template),
            *_form(checkpoint, template),
        ),
    )


def _form(checkpoint: Checkpoint, template: ChatTemplate) -> tuple[str, ...]:
    """Return a note that shows the prompt form that was chosen by its name."""
    if checkpoint.conversation is None:
        return ()
    shown = template.render([Message.blank("user", "What is this?", images=1)])
    return (f"Prompts have the form {checkpoint.conversation}: {shown!r}",)


def _image_token(checkpoint: Checkpoint, found: CheckpointTokenizer, image_token_id: Any) -> str:
    """Return the text of the image placeholder.

    Raises:
        CheckpointError: The tokenizer has no placeholder with this id, or the id is that of ordinary text.
    """
    backend = found.backend
    token = _token(found, image_token_id)
    ordinary = image_token_id not in backend.get_added_tokens_decoder() or token in (
        found.bos_token,
        found.eos_token,
    )
    if token is not None and ordinary:
        raise CheckpointError(
            f"The model replaces the token {image_token_id} by a picture, and {token!r} is a part of texts.",
            "Correct image_token_index (or image_token_id) in config.json.",
        )
    if token is not None and backend.encode(token, add_special_tokens=False).ids == [image_token_id]:
        return token
    usual = backend.token_to_id("<image>")
    has = "" if usual is None else f"; its <image> has the id {usual}"
    raise CheckpointError(
        f"The tokenizer of {checkpoint.path} has no image placeholder with the id {image_token_id}{has}.",
        "Correct image_token_index (or image_token_id) in config.json, or take the tokenizer that belongs to "
        "the model.",
    )


def _token(found: CheckpointTokenizer, token_id: Any) -> str | None:
    """Return the token with an id; None if there is none, or if this is no id."""
    is_id = isinstance(token_id, int) and 0 <= token_id < 2**32
    return found.backend.id_to_token(token_id) if is_id else None


def _eos_token_ids(
    checkpoint: Checkpoint, config: Any, found: CheckpointTokenizer
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the ids of the tokens that end a text, and notes for the user.

    The first of these that names a token decides: generation_config.json, config.json, the tokenizer's files,
    and the default of the decoder's configuration class. Other settings of generation_config.json are not
    read, so errors in them do no harm.
    """
    notes: tuple[str, ...] = ()
    try:
        generation = checkpoint.read_json("generation_config.json")
    except CheckpointError as error:
        generation, notes = {}, (f"{error.what} The ends of text are taken from other files.",)
    whole = checkpoint.read_json("config.json")
    settings = [part for part in (generation, whole.get("text_config"), whole) if isinstance(part, dict)]
    # The class's default comes last, because it may belong to another tokenizer.
    default = getattr(config.text_config, "eos_token_id", None)
    for value in (*(part.get("eos_token_id") for part in settings), found.eos_token, default):
        ids = [_token_id(entry, found) for entry in (value if isinstance(value, list) else [value])]
        if ends := tuple(dict.fromkeys(token for token in ids if token is not None)):
            return ends, notes
    return (), (
        *notes,
        "The checkpoint names no token that ends a text: answers end at --max-new-tokens, or at a --stop.",
    )


def _token_id(value: Any, found: CheckpointTokenizer) -> int | None:
    """Return the id of a token that is given by its id or its text; None if there is no such token."""
    added = {token.content: index for index, token in found.backend.get_added_tokens_decoder().items()}
    if isinstance(value, str):
        return added.get(value, int(value) if value.isdecimal() and len(value) < 10 else None)
    is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if is_id and found.backend.id_to_token(value) is not None else None


def _image_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings of the image processor, from the newer nested file or else from the older one."""
    nested = checkpoint.read_json(PROCESSOR_CONFIG).get("image_processor")
    found = nested if isinstance(nested, dict) else checkpoint.read_json(IMAGE_PROCESSOR)
    if not found:
        raise CheckpointError(
            f"{checkpoint.path} has no {IMAGE_PROCESSOR} that says how pictures are prepared.",
            "Put the checkpoint's processor files beside its weights.",
        )
    if not any(found.get(key) for key in _CLASS_KEYS):
        found = found | {"image_processor_type": _IMAGE_CLASSES[checkpoint.model_type]}
    return found


def _video_processor(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the settings by which the frames of a video are prepared; None if the family takes no videos.

    They are those of the newer nested file, or of the older one, or else of the image processor, as in
    transformers.
    """
    name = _VIDEO_CLASSES.get(checkpoint.model_type)
    if name is None:
        return None
    nested = checkpoint.read_json(PROCESSOR_CONFIG).get("video_processor")
    found = nested if isinstance(nested, dict) else checkpoint.read_json(VIDEO_PROCESSOR)
    found = found or _image_processor(checkpoint)
    # do_pad pads the videos of a batch to one length, and there is only one video here. Older files name the
    # class of an image processor, so the class is set anew.
    kept = found.keys() - {"do_pad", *_CLASS_KEYS}
    return {key: found[key] for key in sorted(kept)} | {"video_processor_type": name}


def processor_files(processor: Processor) -> dict[str, str]:
    """Return the text of each file that the manifest's entries for text and images name, by file name."""
    files = {
        processor.text.tokenizer: processor.json,
        IMAGE_PROCESSOR: _to_json(processor.image_processor),
    }
    if processor.video_processor is not None:
        files[VIDEO_PROCESSOR] = _to_json(processor.video_processor)
    if processor.text.chat_template is not None and processor.template_source is not None:
        files[processor.text.chat_template] = processor.template_source
    return files


def _to_json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2) + "\n"
