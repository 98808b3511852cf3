"""Messages of a conversation: texts and pictures, in the order in which they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image

from visprune.errors import InputError
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.pictures import Picture
from visprune.runtime.vision.sources import Video

if TYPE_CHECKING:
    from visprune.runtime.vision.sources import VisualInput

__all__ = ["Message", "Part", "is_video"]

Part: TypeAlias = "str | Image.Image | Video | Picture"
"""A text, an image in RGB, a video whose frames are such images, or a picture for the vision tower."""


@dataclass(frozen=True, slots=True, init=False)
class Message:
    """One message.

    Args:
        role: "user", "assistant", "system", or another role of the model's chat template.
        parts: A text, or several texts and images in order. A string is a text; an image has any other form
            that `visprune.runtime.vision.sources.ImageSource` lists, and is decoded here. A `Video` follows
            the images of its message.

    Attributes:
        role: As given.
        parts: The parts, with images decoded.

    Raises:
        InputError: The role is empty, an image cannot be read, or an image follows a video.
    """

    role: str
    parts: tuple[Part, ...]

    def __init__(self, role: str, parts: str | Sequence[str | VisualInput | Picture]) -> None:
        if not role:
            raise InputError("A message has no role.", 'Use "user", "assistant" or "system".')
        given = (parts,) if isinstance(parts, str) else parts
        if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray, memoryview)):
            raise InputError(
                f"The parts of a message were given as {type(given).__name__}.",
                'Give a text, or a list of texts and images: Message("user", [image, "What is it?"]).',
            )
        object.__setattr__(self, "role", role)
        object.__setattr__(self, "parts", tuple(map(_part, given)))
        videos = [is_video(part) for part in self.visual]
        if videos != sorted(videos):
            raise InputError("A picture follows a video in one message.", "Put the pictures first.")

    @classmethod
    def blank(cls, role: str, text: str, images: int = 0, videos: int = 0) -> Message:
        """Return a message with so many empty images and videos before its text, to try a template with.

        Raises:
            InputError: The role is empty, or the number of images is negative.
        """
        if images < 0:
            raise InputError(f"A message has {images} images.", "Give a number of 0 or more.")
        pixel = Image.new("RGB", (1, 1))
        return cls(role, [*[pixel] * images, *[Video((pixel,))] * videos, text])

    @property
    def text(self) -> str:
        """All texts, joined by newlines."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def visual(self) -> tuple[Image.Image | Video | Picture, ...]:
        """The images and videos."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def videos(self) -> int:
        """Number of videos."""
        return sum(map(is_video, self.visual))

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.visual) - self.videos

    def with_pictures(self, pictures: Sequence[Picture]) -> Message:
        """Return the message with its images and videos replaced, in order."""
        new = iter(pictures)
        return Message(self.role, [part if isinstance(part, str) else next(new) for part in self.parts])


def _part(given: object) -> Part:
    if isinstance(given, (str, Picture)):
        return given
    if isinstance(given, Video):
        return replace(given, frames=tuple(decode(frame) for frame in given.frames))
    return decode(given)  # type: ignore[arg-type]  # it refuses what is no image


def is_video(part: Part) -> bool:
    """Return whether a part is a video."""
    return isinstance(part, Video) or (isinstance(part, Picture) and part.is_video)
