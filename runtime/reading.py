"""Readers of a bundle's small files: tokenizer, chat template, image and video processor.

They need no graph, so that texts and images can be checked before anything large is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from visprune.bundle import Bundle
from visprune.errors import BundleError
from visprune.runtime.chat_template import ChatTemplate
from visprune.runtime.interfaces import check_pixels
from visprune.runtime.prompts import check_stops, check_system
from visprune.runtime.text import Tokenizer
from visprune.runtime.vision.pictures import PictureMaker
from visprune.runtime.vision.preprocess import ImageProcessor

__all__ = ["check_texts", "read_pictures", "read_template", "read_tokenizer"]


def check_texts(bundle: Bundle, *, system: str | None = None, stop: Sequence[str] = ()) -> None:
    """Refuse a system prompt or stops that no conversation can have, before anything large is read.

    Raises:
        InputError: `check_system` refuses the system prompt.
        UsageError: A stop can never match.
        BundleError: A file cannot be read.
    """
    if system is not None:
        check_system(system, bundle.manifest.text, read_template(bundle), str(bundle.path))
    if stop:
        check_stops(stop, read_tokenizer(bundle))


def read_tokenizer(bundle: Bundle) -> Tokenizer:
    """Read the tokenizer.

    Raises:
        BundleError: The file cannot be read, or does not fit the manifest.
    """
    text = bundle.manifest.text
    return Tokenizer.from_file(
        bundle.file(text.tokenizer),
        text.image_token,
        text.image_token_id,
        text.bos_token,
        bundle.manifest.decoder.eos_token_ids,
    )


def read_template(bundle: Bundle) -> ChatTemplate:
    """Read the chat template. A bundle without one gets the plain form that `ChatTemplate` describes.

    Raises:
        BundleError: The file cannot be read, or the template cannot be compiled.
    """
    text = bundle.manifest.text
    source = _read_text(bundle.file(text.chat_template)) if text.chat_template else None
    return ChatTemplate(source, text.bos_token, text.eos_token, text.image_token)


def read_pictures(bundle: Bundle) -> PictureMaker:
    """Read the image processor and the video processor, if there is one.

    Raises:
        BundleError: A file cannot be read, or its images have another size than the vision encoder takes.
        UnsupportedError: A setting is not supported.
    """
    manifest = bundle.manifest
    image = ImageProcessor.from_config(_read_json(bundle.file(manifest.image_processor)))
    check_pixels(manifest, image)
    if manifest.video_processor is None:
        return PictureMaker(image, manifest.tiling)
    video = ImageProcessor.from_config(_read_json(bundle.file(manifest.video_processor)))
    check_pixels(manifest, video)
    return PictureMaker(image, manifest.tiling, video)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}.", "Export the model again.") from None


def _read_json(path: Path) -> dict[str, object]:
    text = _read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}.", "Export the model again.") from None
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a JSON object.", "Export the model again.")
    return data
