"""What a reader does on the server's page, in a browser."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageChops

from visprune import bundled

PICTURE = bundled.IMAGE
QUESTION = "What is the letter?"
KEY = "a-key-of-the-tests"


def ask(page: Any, question: str) -> None:
    """Type a question, press Enter, and wait until all of its answers are there."""
    asked = page.locator(".turn").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_function("n => document.querySelectorAll('.turn').length > n", arg=asked)
    settled(page)


def settled(page: Any) -> None:
    """Wait until nothing is being answered."""
    page.wait_for_function("() => document.querySelector('#stop').hidden")


def texts(page: Any, selector: str) -> list[str]:
    """Return the texts of the last turn that are seen, one for each of its answers."""
    return [text.strip() for text in page.locator(f".turn:last-child {selector}:visible").all_inner_texts()]


def overlay(page: Any, place: int = 0) -> Image.Image:
    """Return the picture that the page shows."""
    page.wait_for_function("() => document.querySelector('#shown img').src.startsWith('data:')")
    address = page.locator("#shown img").nth(place).get_attribute("src")
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")


def same(one: Image.Image, other: Image.Image) -> bool:
    """Return whether two pictures are equal, pixel for pixel."""
    return one.size == other.size and ImageChops.difference(one, other.convert("RGB")).getbbox() is None


def set_ratio(page: Any, percent: int) -> None:
    """Move the slider as a keyboard does."""
    slider = page.locator("#ratio")
    slider.focus()
    steps = percent - int(slider.input_value())
    for _ in range(abs(steps)):
        slider.press("ArrowRight" if steps > 0 else "ArrowLeft")
    page.wait_for_timeout(500)  # the page waits for the last step before it asks
    settled(page)


def answered(visit: Any, address: str, **options: Any) -> Any:
    """Open a page and ask `QUESTION` about the demo picture."""
    page = visit(address, **options)
    page.set_input_files("#file", PICTURE)
    ask(page, QUESTION)
    return page
