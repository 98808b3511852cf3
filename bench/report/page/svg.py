"""SVG drawings: shapes, scales with ticks, and labels that do not overlap.

A `Canvas` collects shapes; `templates/parts.html.jinja` writes them as SVG and escapes every text. Colours
and fonts are classes of the style sheet, so that one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["NARROW", "WIDE", "Canvas", "Scale", "Shape", "spread_out", "text_width"]

WIDE, NARROW = 880, 344
"""Widths of the two drawings of a figure, in pixels, for wide and narrow screens."""

_CHARACTER = 7.0  # pixels, a little more than the usual width of one in the style sheet's 12 px

Anchor = Literal["start", "middle", "end"]


def text_width(text: str) -> float:
    """Estimate the width of a label in pixels, rather too large than too small."""
    return _CHARACTER * len(text)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear scale with round ticks.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: Pixels.
        end: Pixels.
        step: Difference of the values of two ticks.
    """

    low: float
    high: float
    start: float
    end: float
    step: float

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float, *, zero: bool, ticks: int = 5) -> Scale:
        """Return a scale from one tick to another that covers some values, and 0 if wanted."""
        known = [*values, *([0.0] if zero else [])]
        low, high = min(known), max(known)
        if high <= low:
            low, high = (0.0, high) if high > 0 else (low - 1, low + 1)
        step = _round_step((high - low) / ticks)
        return cls(
            math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end, step
        )

    def __call__(self, value: float) -> float:
        """Return the place of a value, in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the values of the ticks and their labels."""
        count = round((self.high - self.low) / self.step)
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return [(v, f"{v:.{decimals}f}") for v in (self.low + i * self.step for i in range(count + 1))]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


@dataclass(frozen=True, slots=True)
class Shape:
    """An element of a drawing.

    Attributes:
        tag: Name of the SVG element.
        attributes: Attributes of the element, unescaped.
        text: Content, of a `text` element.
        tooltip: Text that browsers show under the pointer.
    """

    tag: str
    attributes: dict[str, str]
    text: str = ""
    tooltip: str = ""


@dataclass(slots=True)
class Canvas:
    """A drawing to which shapes are added.

    Attributes:
        width: Pixels.
        height: Pixels.
        label: Description for screen readers; without one they skip the drawing.
        shapes: In the order in which they are drawn.
    """

    width: float
    height: float
    label: str = ""
    shapes: list[Shape] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, *, anchor: Anchor = "start", style: str = "label") -> None:
        """Add a line of text; y is its baseline."""
        self.shapes.append(
            Shape("text", {**_pixels(x=x, y=y), "text-anchor": anchor, "class": style}, text=text)
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """Add a straight line."""
        self.shapes.append(Shape("line", {**_pixels(x1=x1, y1=y1, x2=x2, y2=y2), "class": style}))

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Add straight lines from point to point."""
        course = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.shapes.append(Shape("polyline", {"points": course, "class": style}))

    def rect(self, x: float, y: float, width: float, height: float, style: str, tooltip: str = "") -> None:
        """Add a bar."""
        size = _pixels(x=x, y=y, width=max(0.0, width), height=height)
        self.shapes.append(Shape("rect", {**size, "class": style}, tooltip=tooltip))

    def mark(self, x: float, y: float, shape: int, style: str, tooltip: str = "") -> None:
        """Add a point: shape 0 is a circle, 1 a square, 2 a triangle, 3 a diamond, 4 a circle again."""
        outline = _outline(x, y, shape % 4)
        self.shapes.append(Shape("path", {"d": outline, "class": style}, tooltip=tooltip))

    def ring(self, x: float, y: float, radius: float, style: str) -> None:
        """Add a circle around a point."""
        self.shapes.append(Shape("circle", {**_pixels(cx=x, cy=y, r=radius), "class": style}))

    def x_axis(self, scale: Scale, y1: float, y2: float, title: str) -> None:
        """Add a horizontal axis below a plot that reaches from y1 to y2, with its grid."""
        for value, text in scale.ticks():
            self.line(scale(value), y1, scale(value), y2, "grid")
            self.text(scale(value), y2 + 17, text, anchor="middle", style="tick")
        self.text((scale.start + scale.end) / 2, y2 + 38, title, anchor="middle", style="axis")

    def y_axis(self, scale: Scale, x1: float, x2: float, title: str) -> None:
        """Add a vertical axis left of a plot that reaches from x1 to x2, with its grid and a title above."""
        for value, text in scale.ticks():
            self.line(x1, scale(value), x2, scale(value), "grid")
            self.text(x1 - 8, scale(value) + 4, text, anchor="end", style="tick")
        self.text(4, scale.end - 16, title, style="axis")


def _pixels(**places: float) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in places.items()}


def _outline(x: float, y: float, shape: int) -> str:
    if shape == 0:
        return f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z"
    corners = (
        ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        ((0.0, -6.0), (5.6, 4.2), (-5.6, 4.2)),
        ((0.0, -6.2), (6.2, 0.0), (0.0, 6.2), (-6.2, 0.0)),
    )[shape - 1]
    return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners) + "z"


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart.

    Args:
        places: Wanted places, in pixels.
        gap: Least distance between two.
        low: Lower bound.
        high: Upper bound; if there is no room for all labels, they begin below `low`.

    Returns:
        For each label a place near the one it wanted. Their order is kept.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = [0.0] * len(places)
    last = -math.inf
    for i in order:
        found[i] = last = max(places[i], last + gap, low)
    limit = high
    for i in reversed(order):
        found[i] = min(found[i], limit)
        limit = found[i] - gap
    return found
