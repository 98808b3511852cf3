"""What a checkpoint says of text and pictures: tokenizer, chat template, image and video processors.

All of it is read from the checkpoint's own files. Transformers' processors are not needed: the runtime
prepares text and pictures itself, and it is asked here whether it can.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visprune.errors import CheckpointError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.small_files import read_object
from visprune.export.checkpoint.template import (
    check_placeholders,
    find_template,
    template_notes,
    turn_ends,
    with_tokens,
)
from visprune.export.checkpoint.tokenizer import CheckpointTokenizer, read_tokenizer
from visprune.manifest import Text
from visprune.runtime.chat_template import ChatTemplate
from visprune.runtime.text import Tokenizer

__all__ = ["VIDEO_PROCESSOR", "Processor", "load_processor", "processor_files"]

VIDEO_PROCESSOR = "video_preprocessor_config.json"
_VIDEO_CLASS = "LlavaOnevisionVideoProcessor"  # of the only family that has videos
# What transformers takes where a checkpoint names no class.
_IMAGE_CLASSES = {
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
}
_CLASS_KEYS = ("image_processor_type", "feature_extractor_type")


@dataclass(frozen=True, slots=True)
class Processor:
    """Text and image processing of a checkpoint.

    Attributes:
        json: The text of `tokenizer.json`.
        tokenizer: As the runtime will have it.
        template_source: Of the chat template, or None.
        template: As the runtime will have it.
        image_processor: Its settings.
        text: For the manifest.
        video_processor: Its settings; None where the model takes no videos.
        notes: What a user should know before anything is asked.
    """

    json: str
    tokenizer: Tokenizer
    template_source: str | None
    template: ChatTemplate
    image_processor: dict[str, Any]
    text: Text
    video_processor: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def load_processor(checkpoint: Checkpoint, config: Any, chat_template: str | Path | None = None) -> Processor:
    """Tokenizer, chat template and image processor, checked to fit the model and each other.

    Args:
        checkpoint: The checkpoint.
        config: Its configuration.
        chat_template: A file that takes the place of its own template.

    Raises:
        CheckpointError: One of them is missing or does not fit the model.
        UsageError: The file that was given has no template.
        BundleError: The template fails.
    """
    found = read_tokenizer(checkpoint)
    image_token_id = config.image_token_id
    image_token = _placeholder(checkpoint, found, image_token_id)
    video_token_id = getattr(config, "video_token_id", None)
    video_token = found.backend.id_to_token(video_token_id) if isinstance(video_token_id, int) else None
    ends, notes = _ends(checkpoint, config, found)
    source = with_tokens(find_template(checkpoint.path, chat_template), found.said)
    template = ChatTemplate(source, found.bos_token, found.eos_token, image_token)
    tokenizer = Tokenizer.from_backend(found.backend, image_token, image_token_id, found.bos_token, ends)
    check_placeholders(template, tokenizer)
    more = turn_ends(template, tokenizer, ends)
    if more:
        name = found.backend.id_to_token(more[0])
        notes += (
            f"The chat template ends an answer with {name} ({more[0]}), which the checkpoint does not count "
            "among its ends of text; it is one in the bundle.",
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
        notes=(*found.notes, *notes, *template_notes(source, template)),
    )


def _placeholder(checkpoint: Checkpoint, found: CheckpointTokenizer, image_token_id: Any) -> str:
    backend = found.backend
    token = (
        backend.id_to_token(image_token_id)
        if isinstance(image_token_id, int) and 0 <= image_token_id < 2**32
        else None
    )
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


def _ends(
    checkpoint: Checkpoint, config: Any, found: CheckpointTokenizer
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The tokens that end a text, and what is to be said of them.

    Of generation_config.json nothing else is read: what transformers refuses in it does not concern a bundle.
    """
    notes: tuple[str, ...] = ()
    try:
        generation = read_object(checkpoint.path / "generation_config.json")
    except CheckpointError as error:
        generation, notes = {}, (f"{error.what} The ends of text are taken from other files.",)
    whole = read_object(checkpoint.path / "config.json")
    said = [part for part in (generation, whole.get("text_config"), whole) if isinstance(part, dict)]
    # What no file says is a default of the class, which may be of another tokenizer.
    default = getattr(config.text_config, "eos_token_id", None)
    for value in (*(part.get("eos_token_id") for part in said), found.eos_token, default):
        ids = [_token_id(entry, found) for entry in (value if isinstance(value, list) else [value])]
        if ends := tuple(dict.fromkeys(token for token in ids if token is not None)):
            return ends, notes
    return (), (
        *notes,
        "The checkpoint names no token that ends a text: answers end at --max-new-tokens, or at a --stop.",
    )


def _token_id(value: Any, found: CheckpointTokenizer) -> int | None:
    """The id of a token that is named by its id or by its text; None where there is no such token."""
    added = {token.content: index for index, token in found.backend.get_added_tokens_decoder().items()}
    if isinstance(value, str):
        return added.get(value, int(value) if value.isdecimal() and len(value) < 10 else None)
    is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if is_id and found.backend.id_to_token(value) is not None else None


def _image_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the image processor: the newer file's, or those of the file of their own."""
    nested = read_object(checkpoint.path / "processor_config.json").get("image_processor")
    found = nested if isinstance(nested, dict) else read_object(checkpoint.path / "preprocessor_config.json")
    if not found:
        raise CheckpointError(
            f"{checkpoint.path} has no preprocessor_config.json that says how pictures are prepared.",
            "Put the checkpoint's processor files beside its weights.",
        )
    if not any(found.get(key) for key in _CLASS_KEYS):
        found = found | {"image_processor_type": _IMAGE_CLASSES[checkpoint.model_type]}
    return found


def _video_processor(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How the frames of a video are prepared."""
    found = read_object(checkpoint.path / VIDEO_PROCESSOR)
    found = found or read_object(checkpoint.path / "processor_config.json").get("video_processor") or {}
    if not isinstance(found, dict) or not found:
        return None
    # Padding would make the videos of a batch alike, and here is one. Older files name no class.
    kept = found.keys() - {"do_pad", "image_processor_type"}
    return {key: found[key] for key in sorted(kept)} | {"video_processor_type": _VIDEO_CLASS}


def processor_files(processor: Processor) -> dict[str, str]:
    """The files that `processor.text` and the manifest name, with their text."""
    files = {
        processor.text.tokenizer: processor.json,
        "preprocessor_config.json": _text(processor.image_processor),
    }
    if processor.video_processor is not None:
        files[VIDEO_PROCESSOR] = _text(processor.video_processor)
    if processor.text.chat_template is not None and processor.template_source is not None:
        files[processor.text.chat_template] = processor.template_source
    return files


def _text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2) + "\n"
