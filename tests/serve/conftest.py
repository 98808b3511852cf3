"""Servers that the tests of a file share, each a process with the demo model or the tiny one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from serving import Served, data_url, serving

from visprune.bundled import IMAGE


@pytest.fixture(scope="module")
def server(demo_bundle: Path) -> Iterator[Served]:
    """A server as it is by default, without keys."""
    with serving([demo_bundle]) as served:
        yield served


@pytest.fixture(scope="session")
def scene() -> str:
    """A picture of the demo as a data: URL."""
    with Image.open(IMAGE) as image:
        return data_url(image)
