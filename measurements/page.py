"""Picture of the server's page after an answer about the demo image, for docs/images/serve.png.

    visprune-export --method fopru-rank --ratio 0.25
    visprune-serve visprune-demo-fopru-rank-keep36 --threads 1
    python measurements/page.py http://127.0.0.1:8000 docs/images/serve.png

The server must not know the demo image yet: its cache would keep the vision encoder out of the times. They
are printed, so that several pictures can be compared and a typical one kept.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from visprune import bundled

WIDTH = 1280


def main() -> None:
    """Ask a question on the page of a running server, and write what a reader sees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("output", type=Path)
    parser.add_argument("--question", default="What color is the digit?")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    args = parser.parse_args()
    with sync_playwright() as found:
        browser = found.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 960}, color_scheme=args.scheme)
        page.goto(args.address)
        other = bundled.CALIBRATION.with_suffix("") / "scene00.png"
        for image in (other, bundled.IMAGE):  # the first answer of a process is slower than all others
            page.set_input_files("#file", image)
            page.wait_for_selector("#shown img")
            page.fill("#question", args.question)
            page.press("#question", "Enter")
            page.wait_for_selector(".verdict:not(:empty)")
        page.mouse.move(0, 0)
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(500)  # the picture fades in
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        print(
            *page.locator(".turn:last-child .bar").evaluate_all("bars => bars.map(bar => bar.ariaLabel)"),
            sep="\n",
        )
        browser.close()
    shot.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
