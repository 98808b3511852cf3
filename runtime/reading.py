"""What a bundle's small files hold: tokenizer, chat template, preprocessing. No graph is needed for these."""

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
    """Refuse a system prompt and stops that no conversation can have, before anything large is read.

    Raises:
        InputError: A system prompt that `check_system` refuses.
        UsageError: A stop that can never match.
        BundleError: A file cannot be read.
    """
    if system is not None:
        check_system(system, bundle.manifest.text, read_template(bundle), str(bundle.path))
    if stop:
        check_stops(stop, read_tokenizer(bundle))


def read_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer.

    Raises:
        BundleError: It cannot be read, or does not fit the manifest.
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
    """The chat template, or what stands for one where there is none.

    Raises:
        BundleError: It cannot be read.
    """
    text = bundle.manifest.text
    source = _read_text(bundle.file(text.chat_template)) if text.chat_template else None
    return ChatTemplate(source, text.bos_token, text.eos_token, text.image_token)


def read_pictures(bundle: Bundle) -> PictureMaker:
    """What prepares pictures and videos.

    Raises:
        BundleError: A file cannot be read, or makes other pictures than the vision encoder takes.
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
        raise BundleError(f"{path} is not an object.", "Export the model again.")
    return data
