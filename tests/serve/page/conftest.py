"""Real servers with demo bundles, and pages of theirs in a headless Chromium that reports what goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_driver import KEY
from serving import serving

from visprune.bundle import Bundle
from visprune.manifest import MANIFEST

QUICK = ("--threads", "1")
# A status of at least 400 is an error on the console, whatever the page makes of it.
REFUSED = "Failed to load resource: "


@pytest.fixture(scope="session")
def quarter(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle as if it had been exported for 36 of 144 tokens."""
    folder = tmp_path_factory.mktemp("bundles") / "quarter"
    shutil.copytree(demo_bundle, folder)
    manifest = Bundle.open(folder).manifest
    changed = replace(manifest, pruning=replace(manifest.pruning, keep_tokens=36))
    (folder / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="package")
def one(chromium_path: str, quarter: Path) -> Iterator[str]:
    """Address of a server with one bundle."""
    with serving([quarter], *QUICK) as served:
        yield served.address


@pytest.fixture(scope="package")
def two(chromium_path: str, quarter: Path, demo_bundle: Path) -> Iterator[str]:
    """Address of a server with two bundles."""
    with serving([quarter, demo_bundle], *QUICK) as served:
        yield served.address


@pytest.fixture(scope="package")
def locked(chromium_path: str, quarter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that wants `KEY`."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY}\n", encoding="utf-8")
    with serving([quarter], *QUICK, "--api-key-file", str(keys), key=KEY) as served:
        yield served.address


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens a page: visit(address, path, width=, scheme=, refusals=, ...).

    After the test it is an error if a page wrote to the console, failed, or asked for anything elsewhere.
    Refused requests are on the console too; `refusals` says that there may be some.
    """
    told: list[str] = []
    contexts = []

    def opened(
        address: str,
        path: str = "/",
        *,
        width: int = 1280,
        scheme: str = "light",
        refusals: bool = False,
        **options: Any,
    ):
        phone = {"has_touch": True, "is_mobile": True} if width < 600 else {}
        context = chromium.new_context(
            viewport={"width": width, "height": 844 if width < 600 else 900},
            color_scheme=scheme,
            **phone,
            **options,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)

        def on_console(message: Any) -> None:
            if not (refusals and message.text.startswith(REFUSED)):
                told.append(f"console: {message.text}")

        def on_request(request: Any) -> None:
            if not request.url.startswith((address, "data:", f"blob:{address}")):
                told.append(f"request: {request.url}")

        page.on("console", on_console)
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.on("request", on_request)
        page.goto(address + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert told == []
