"""SVG by small pieces: shapes, scales, and texts that keep out of each other's way.

Colours and fonts are classes of the style sheet, so that one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

__all__ = ["NARROW", "WIDE", "Canvas", "Scale", "spread_out", "text_width"]

WIDE, NARROW = 880, 344
"""Widths of the two drawings of a figure, in pixels of the screen it is for."""

_CHARACTER = 7.0  # pixels, a little more than the usual width of one in the style sheet's 12 px

Anchor = Literal["start", "middle", "end"]


def text_width(text: str) -> float:
    """Pixels that a label takes, rather too many than too few."""
    return _CHARACTER * len(text)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear scale with round ticks.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: Pixels.
        end: Pixels.
        step: Between ticks.
    """

    low: float
    high: float
    start: float
    end: float
    step: float

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float, *, zero: bool, ticks: int = 5) -> Scale:
        """A scale that holds some values, and 0 if wanted; its ends are ticks."""
        known = [*values, *([0.0] if zero else [])]
        low, high = min(known), max(known)
        if high <= low:
            low, high = (0.0, high) if high > 0 else (low - 1, low + 1)
        step = _round_step((high - low) / ticks)
        return cls(
            math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end, step
        )

    def __call__(self, value: float) -> float:
        """Pixels of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Values, and how they are written."""
        count = round((self.high - self.low) / self.step)
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return [(v, f"{v:.{decimals}f}") for v in (self.low + i * self.step for i in range(count + 1))]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


@dataclass(slots=True)
class Canvas:
    """A drawing that grows.

    Attributes:
        width: Pixels.
        height: Pixels.
        label: What it shows, for those who do not see it.
    """

    width: float
    height: float
    label: str
    _parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, *, anchor: Anchor = "start", style: str = "label") -> None:
        """A line of text; y is its baseline."""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}"'
        self._parts.append(f"<text {place}>{escape(text)}</text>")

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line."""
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self._parts.append(f'<line {ends} class="{style}"/>')

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Straight lines from point to point."""
        course = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{course}" class="{style}"/>')

    def rect(self, x: float, y: float, width: float, height: float, style: str, about: str = "") -> None:
        """A bar; `about` is shown under the pointer."""
        size = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}"'
        self._parts.append(f'<rect {size} class="{style}">{_title(about)}</rect>')

    def mark(self, x: float, y: float, shape: int, style: str, about: str = "") -> None:
        """A point: shape 0 is a circle, then square, triangle, diamond."""
        self._parts.append(f'<path d="{_outline(x, y, shape % 4)}" class="{style}">{_title(about)}</path>')

    def ring(self, x: float, y: float, radius: float, style: str) -> None:
        """A circle around a point."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="{style}"/>')

    def across(self, scale: Scale, y1: float, y2: float, title: str) -> None:
        """A horizontal axis below a plot from y1 to y2, with its grid."""
        for value, text in scale.ticks():
            self.line(scale(value), y1, scale(value), y2, "grid")
            self.text(scale(value), y2 + 17, text, anchor="middle", style="tick")
        self.text((scale.start + scale.end) / 2, y2 + 38, title, anchor="middle", style="axis")

    def up(self, scale: Scale, x1: float, x2: float, title: str) -> None:
        """A vertical axis left of a plot from x1 to x2, its title above it."""
        for value, text in scale.ticks():
            self.line(x1, scale(value), x2, scale(value), "grid")
            self.text(x1 - 8, scale(value) + 4, text, anchor="end", style="tick")
        self.text(4, scale.end - 16, title, style="axis")

    def svg(self, style: str) -> str:
        """The element."""
        box = f'viewBox="0 0 {self.width:g} {self.height:g}"'
        size = f'width="{self.width:g}" height="{self.height:g}"'
        return (
            f'<svg {box} {size} class="{style}" role="img" aria-label="{escape(self.label)}">'
            f"{''.join(self._parts)}</svg>"
        )


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


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
    """Places near those wanted, in the same order, at least `gap` apart, and within bounds if they fit."""
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
