"""Files of the page: read once, and found by name only, so that no path leads to another file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # not in Python 3.10

__all__ = ["PageFile", "page_files"]

_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page.

    Attributes:
        content: Its bytes.
        kind: Type for the header Content-Type.
    """

    content: bytes = field(repr=False)
    kind: str


def page_files() -> dict[str, PageFile]:
    """Return the files of the page by their paths below its folder."""
    return dict(_found(files("visprune.serve") / "page", ""))


def _found(folder: Traversable, prefix: str) -> Iterator[tuple[str, PageFile]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _found(entry, f"{prefix}{entry.name}/")
        elif kind := _KINDS.get(f".{entry.name.rpartition('.')[2]}"):
            yield prefix + entry.name, PageFile(entry.read_bytes(), kind)
