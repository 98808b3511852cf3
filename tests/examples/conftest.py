"""The examples as their users run them: scripts, on bundles of the demo model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import visprune
from visprune import demo

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """Make a bundle of the demo model once for each method: `bundle("fopru-row", ratio=0.25) -> Path`."""
    pytest.importorskip("torch")
    made: dict[str, Path] = {}

    def make(method: str, **options: object) -> Path:
        name = f"{method}{options}"
        if name not in made:
            output = tmp_path_factory.mktemp("bundle") / "demo"
            made[name] = visprune.export(method=method, output=output, verify=False, **options).path
        return made[name]

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The bundled scene, another one, and the first without its lower edge: a picture that is cropped."""
    from PIL import Image

    wide = tmp_path_factory.mktemp("pictures") / "wide.png"
    scene = Image.open(demo.IMAGE)
    scene.crop((0, 0, scene.width, scene.height * 3 // 4)).save(wide)
    return [demo.IMAGE, min(demo.CALIBRATION.with_suffix("").iterdir()), wide]


@pytest.fixture(scope="session")
def example():
    """Run an example: `example("plain_onnxruntime", bundle, picture, question) -> its output`."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
