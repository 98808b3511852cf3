"""What a checkpoint says of text and pictures: tokenizer, chat template, image and video processors."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import transformers

from visprune.errors import CheckpointError
from visprune.export.checkpoint import Checkpoint
from visprune.export.reasons import first_line, hint
from visprune.manifest import Text

__all__ = ["VIDEO_PROCESSOR", "Processor", "load_processor", "processor_files", "read_processor"]

_VIDEO_CLASS = "LlavaOnevisionVideoProcessor"  # of the only family that has videos
VIDEO_PROCESSOR = "video_preprocessor_config.json"
_PROCESSOR_HINT = "Put the checkpoint's tokenizer and processor files beside its weights."


@dataclass(frozen=True, slots=True)
class Processor:
    """Text and image processing of a checkpoint, as text to write into a bundle."""

    tokenizer: str
    chat_template: str | None
    image_processor: dict[str, Any]
    text: Text
    video_processor: dict[str, Any] | None = None


def read_processor(checkpoint: Checkpoint) -> Any:
    """Transformers' own processor.

    Raises:
        CheckpointError: It is missing or broken, or needs code that is not trusted.
    """
    code = {"local_files_only": True, "trust_remote_code": checkpoint.trust_remote_code}
    try:
        return transformers.AutoProcessor.from_pretrained(checkpoint.path, **code)
    except Exception as error:
        raise _no_processor(checkpoint, error) from None


def _no_processor(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The processor of {checkpoint.path} cannot be read: {first_line(error)}",
        hint(error, _PROCESSOR_HINT),
    )


def load_processor(checkpoint: Checkpoint, config: Any) -> Processor:
    """Tokenizer, chat template and image processor, as transformers resolves them.

    Raises:
        CheckpointError: One of them is missing or does not fit the model.
    """
    code = {"local_files_only": True, "trust_remote_code": checkpoint.trust_remote_code}
    try:
        # Not AutoProcessor: it may want a video processor, and that torchvision, which nothing here needs.
        tokenizer, image_processor = (
            auto.from_pretrained(checkpoint.path, **code)
            for auto in (transformers.AutoTokenizer, transformers.AutoImageProcessor)
        )
        said, _ = transformers.ProcessorMixin.get_processor_dict(checkpoint.path, local_files_only=True)
    except Exception as error:
        raise _no_processor(checkpoint, error) from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.json.", _PROCESSOR_HINT)
    fast = type(backend).from_str(backend.to_str())
    fast.no_truncation()
    fast.no_padding()
    image_token_id = config.image_token_id
    image_token = fast.id_to_token(image_token_id) if isinstance(image_token_id, int) else None
    if image_token is None or fast.encode(image_token, add_special_tokens=False).ids != [image_token_id]:
        raise CheckpointError(
            f"The tokenizer of {checkpoint.path} has no image placeholder with the id {image_token_id}.",
            "Correct image_token_id in config.json, or take the tokenizer that belongs to the model.",
        )
    video_token_id = getattr(config, "video_token_id", None)
    video_token = fast.id_to_token(video_token_id) if isinstance(video_token_id, int) else None
    template = said.get("chat_template") or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    return Processor(
        tokenizer=fast.to_str(pretty=True),
        chat_template=template,
        image_processor=json.loads(image_processor.to_json_string()),
        text=Text(
            tokenizer="tokenizer.json",
            chat_template="chat_template.jinja" if template else None,
            image_token=image_token,
            image_token_id=image_token_id,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            video_token=video_token,
            video_token_id=video_token_id if video_token else None,
        ),
        video_processor=_video_processor(checkpoint) if video_token else None,
    )


def _video_processor(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How the frames of a video are prepared, from the file itself: transformers needs torchvision for it."""
    for name in ("video_preprocessor_config.json", "processor_config.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((checkpoint.path / name).read_text(encoding="utf-8"))
            settings = found.get("video_processor") if name.startswith("processor") else found
            if isinstance(settings, dict):
                # Padding would make the videos of a batch alike, and here is one. Older files name no class.
                kept = settings.keys() - {"do_pad", "image_processor_type"}
                return {key: settings[key] for key in sorted(kept)} | {"video_processor_type": _VIDEO_CLASS}
    return None


def processor_files(processor: Processor) -> dict[str, str]:
    """The files that `processor.text` and the manifest name, with their text."""
    files = {
        processor.text.tokenizer: processor.tokenizer,
        "preprocessor_config.json": json.dumps(processor.image_processor, indent=2) + "\n",
    }
    if processor.video_processor is not None:
        files[VIDEO_PROCESSOR] = json.dumps(processor.video_processor, indent=2) + "\n"
    if processor.text.chat_template is not None and processor.chat_template is not None:
        files[processor.text.chat_template] = processor.chat_template
    return files
