"""Generated scenes and questions about them: the data of the demo model.

A scene shows one digit, one letter, one shape and one arrow on a soft background, each in its own place and
colour. A question is about one of the four, so its answer is in the few patches under that thing: a pruner
that keeps these patches loses nothing, and a pruner that drops them loses the answer. This module knows no
model and no patches.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = [
    "CATEGORIES",
    "COLORS",
    "SIZE",
    "VALUES",
    "Scene",
    "SceneQuestion",
    "Thing",
    "draw",
    "questions",
    "scene",
]

SIZE = 96
"""Side of a scene in pixels."""

VALUES: dict[str, tuple[str, ...]] = {
    "digit": tuple("0123456789"),
    # Without letters that look like a digit at 12 pixels (B 8, G 6, I 1, O 0, S 5, Z 2).
    "letter": tuple("ACEFHKLMPRTX"),
    "shape": ("circle", "square", "triangle", "star", "heart", "diamond"),
    "arrow": ("up", "down", "left", "right"),
}
CATEGORIES = tuple(VALUES)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (240, 130, 20),
    "yellow": (245, 205, 20),
    "green": (45, 150, 65),
    "blue": (35, 95, 210),
    "purple": (130, 55, 175),
    "black": (35, 35, 40),
}

_FINE = 4  # masks are drawn at this multiple of their size and then averaged, for smooth edges
_HEIGHTS = (12, 13, 14, 15)
_MARGIN = 3
_CHUNK = 200  # scenes that a process draws at a time
_CENTRE_GAP = 4  # pixels from a thing's centre to the middle lines, so that "where" has one right answer

_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)),
    "triangle": ((0.5, 0.03), (1.0, 0.95), (0.0, 0.95)),
    "diamond": ((0.5, 0.0), (0.95, 0.5), (0.5, 1.0), (0.05, 0.5)),
    "star": tuple(
        (0.5 + r * float(np.sin(k * np.pi / 5)), 0.53 - r * float(np.cos(k * np.pi / 5)))
        for k, r in enumerate([0.53, 0.22] * 5)
    ),
    "up": ((0.5, 0.0), (0.95, 0.48), (0.64, 0.48), (0.64, 1.0), (0.36, 1.0), (0.36, 0.48), (0.05, 0.48)),
}
_QUARTER_TURNS = {"up": 0, "left": 1, "down": 2, "right": 3}  # counter-clockwise

_ASK_VALUE: dict[str, tuple[str, ...]] = {
    "digit": (
        "Which digit is in the picture?",
        "What number do you see?",
        "Which number is shown?",
        "What is the digit?",
    ),
    "letter": (
        "Which letter is in the picture?",
        "What letter do you see?",
        "Which letter is shown?",
        "What is the letter?",
    ),
    "shape": (
        "What shape is in the picture?",
        "Which shape do you see?",
        "Which shape is shown?",
        "What is the shape?",
    ),
    "arrow": (
        "Which way does the arrow point?",
        "In which direction does the arrow point?",
        "What is the direction of the arrow?",
    ),
}
_ASK_COLOR = ("What color is the {}?", "Which color does the {} have?", "What is the color of the {}?")
_ASK_PLACE = ("Where is the {}?", "In which corner is the {}?", "Where do you see the {}?")


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing in a scene.

    Attributes:
        category: A key of `VALUES`.
        value: Its value, such as "7", "K" or "star"; for an arrow the direction, such as "left".
        color: A key of `COLORS`.
        box: Left, top, right, bottom in pixels of the 96 x 96 scene; right and bottom are outside.
    """

    category: str
    value: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str:
        """The quarter of the image that holds the centre of the thing, such as "top left"."""
        left, top, right, bottom = self.box
        return f"{'top' if top + bottom < SIZE else 'bottom'} {'left' if left + right < SIZE else 'right'}"


@dataclass(frozen=True, slots=True)
class Scene:
    """An image and the things in it: one `Thing` of each category, in the order of `CATEGORIES`."""

    image: Image.Image
    things: tuple[Thing, ...]


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question, its only right answer, and the thing that it asks about."""

    text: str
    answer: str
    thing: Thing


@functools.cache
def _mask(category: str, value: str, height: int, scale: int) -> NDArray[np.float32]:
    """Return the coverage, 0 to 1, of a thing that is `height` pixels high, [h, w].

    Args:
        category: Of the thing.
        value: Of the thing.
        height: In pixels of the 96 x 96 scene.
        scale: Pixels of the result for each of these.
    """
    side = height * _FINE
    if category in ("digit", "letter"):
        # Pillow's own font (Aileron, CC0). Its capitals are about 0.7 of the nominal size.
        font = ImageFont.load_default(side / 0.71)
        canvas = Image.new("L", (3 * side, 3 * side))
        ImageDraw.Draw(canvas).text((side, side // 2), value, fill=255, font=font, stroke_width=_FINE // 2)
        canvas = canvas.crop(canvas.getbbox())
        # Whole pixels, so that averaging below is exact.
        width = max(1, round(canvas.width * side / canvas.height / _FINE)) * _FINE
        canvas = canvas.resize((width, side), Image.Resampling.BOX)
    else:
        canvas = Image.new("L", (side, side))
        draw = ImageDraw.Draw(canvas)
        if value == "circle":
            draw.ellipse((1, 1, side - 2, side - 2), fill=255)
        elif value == "heart":
            draw.ellipse((0, 0.05 * side, 0.53 * side, 0.57 * side), fill=255)
            draw.ellipse((0.47 * side, 0.05 * side, side - 1, 0.57 * side), fill=255)
            corners = ((0.04, 0.43), (0.5, 0.2), (0.96, 0.43), (0.5, 0.98))
            draw.polygon([(x * side, y * side) for x, y in corners], fill=255)
        else:
            corners_of = _POLYGONS["up" if category == "arrow" else value]
            draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in corners_of], fill=255)
    mask = np.asarray(canvas, dtype=np.float32) / 255
    if category == "arrow":
        mask = np.rot90(mask, _QUARTER_TURNS[value])
    k = _FINE // scale
    return np.ascontiguousarray(mask.reshape(mask.shape[0] // k, k, mask.shape[1] // k, k).mean((1, 3)))


def _background(rng: np.random.Generator, scale: int) -> NDArray[np.float32]:
    """Draw a pale, cloudy background with a few faint strokes, [SIZE * scale, SIZE * scale, 3], 0 to 255."""
    side = SIZE * scale
    base = rng.uniform(196, 244, 3)
    cloud = np.zeros((side, side, 3), np.float32)
    for cells, strength in ((5, 14.0), (24, 5.0)):
        noise = np.clip(rng.normal(128, 42, (cells, cells, 3)), 0, 255).astype(np.uint8)
        soft = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        cloud += (np.asarray(soft, np.float32) - 128) * (strength / 42)
    strokes = Image.new("L", (side, side))
    draw = ImageDraw.Draw(strokes)
    for _ in range(int(rng.integers(2, 5))):
        x0, y0, x1, y1 = (float(v) * scale for v in rng.uniform(0, SIZE, 4))
        if rng.random() < 0.5:
            draw.line((x0, y0, x1, y1), fill=255, width=int(rng.integers(1, 3)) * scale)
        else:
            r = float(rng.uniform(3, 9)) * scale
            draw.ellipse((x0 - r, y0 - r, x0 + r, y0 + r), fill=255)
    soft_strokes = strokes.filter(ImageFilter.GaussianBlur(0.6 * scale))
    tint = rng.uniform(-30, 12, 3).astype(np.float32)
    return (base + cloud + np.asarray(soft_strokes, np.float32)[..., None] / 255 * tint).astype(np.float32)


def _place(rng: np.random.Generator, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Draw boxes for things of these (width, height), apart from one another and from the middle lines."""
    boxes: list[tuple[int, int, int, int]] = []
    while len(boxes) < len(sizes):
        width, height = sizes[len(boxes)]
        left = int(rng.integers(_MARGIN, SIZE - _MARGIN - width + 1))
        top = int(rng.integers(_MARGIN, SIZE - _MARGIN - height + 1))
        if min(abs(2 * left + width - SIZE), abs(2 * top + height - SIZE)) < 2 * _CENTRE_GAP:
            continue
        right, bottom = left + width, top + height
        apart = (
            left >= r + _MARGIN or right + _MARGIN <= x or top >= b + _MARGIN or bottom + _MARGIN <= y
            for x, y, r, b in boxes
        )
        if all(apart):
            boxes.append((left, top, right, bottom))
    return boxes


def scene(seed: int, scale: int = 1) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: Any non-negative integer; the same seed gives the same scene.
        scale: 1 for the 96 x 96 image that the model sees, 2 or 4 for the same scene drawn finer.

    Returns:
        The scene; boxes are in pixels of the 96 x 96 image at every scale.

    Raises:
        ValueError: `scale` is not 1, 2 or 4.
    """
    if scale not in (1, 2, 4):
        raise ValueError(f"scale must be 1, 2 or 4, not {scale}")
    rng = np.random.default_rng(seed)
    colors = rng.integers(len(COLORS), size=len(CATEGORIES))
    picked = [(c, str(rng.choice(VALUES[c])), int(rng.choice(_HEIGHTS))) for c in CATEGORIES]
    shapes = [_mask(c, v, h, 1).shape for c, v, h in picked]
    boxes = _place(rng, [(w, h) for h, w in shapes])
    canvas = _background(rng, scale)
    things = []
    for (category, value, height), color_index, box in zip(picked, colors, boxes, strict=True):
        color = list(COLORS)[color_index]
        ink = np.clip(np.array(COLORS[color]) + rng.normal(0, 9, 3), 0, 255)
        left, top, right, bottom = (edge * scale for edge in box)
        cover = _mask(category, value, height, scale)[..., None]
        window = canvas[top:bottom, left:right]
        window += cover * (ink - window)
        things.append(Thing(category, value, color, box))
    return Scene(Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)), tuple(things))


def _drawn(seed: int) -> tuple[NDArray[np.uint8], tuple[Thing, ...]]:
    drawn = scene(seed)
    return np.asarray(drawn.image), drawn.things


def draw(seeds: Sequence[int]) -> tuple[NDArray[np.uint8], list[tuple[Thing, ...]]]:
    """Draw the scenes of these seeds, on all cores if there are many.

    Returns:
        Images [B, SIZE, SIZE, 3], and the things in each.
    """
    if len(seeds) <= _CHUNK:
        drawn = [_drawn(seed) for seed in seeds]
    else:
        with multiprocessing.Pool() as pool:
            drawn = pool.map(_drawn, seeds, chunksize=_CHUNK)
    images, things = zip(*drawn, strict=True)
    return np.stack(images), list(things)


def questions(things: Sequence[Thing], rng: np.random.Generator) -> list[SceneQuestion]:
    """Return every question about a scene once, in a random wording and order.

    There are three questions about each thing: what it is, its colour and its place. The last two may call a
    shape by its name ("the star").
    """
    found = []
    for thing in things:
        names = (thing.category, thing.value) if thing.category == "shape" else (thing.category,)
        found += [
            SceneQuestion(str(rng.choice(_ASK_VALUE[thing.category])), thing.value, thing),
            SceneQuestion(str(rng.choice(_ASK_COLOR)).format(rng.choice(names)), thing.color, thing),
            SceneQuestion(str(rng.choice(_ASK_PLACE)).format(rng.choice(names)), thing.place, thing),
        ]
    return [found[i] for i in rng.permutation(len(found))]
