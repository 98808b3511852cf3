"""The README's commands run as they are written, in order, in one directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]
RUN = [block["body"] for block in BLOCKS if block["kind"] == "bash" and not block["reason"]]
PYTHON = [block["body"] for block in BLOCKS if block["kind"] == "python"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands: a directory with the clone's `demo` in it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "demo").symlink_to(ROOT / "demo")
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    scripts = Path(sys.executable).parent
    if not (scripts / "visprune-export").exists():
        pytest.skip("visprune is not installed in this environment")
    return {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}


def test_the_blocks_were_found():
    text = "\n".join(RUN)
    verbs = ("export", "fit", "quantize", "build", "bench", "run", "chat", "methods", "inspect", "doctor")
    for command in verbs:
        assert f"visprune-{command}" in text
    assert README.count("```") == 2 * len(BLOCKS)
    assert PYTHON


def test_every_command_of_the_readme_runs(workplace, environment):
    for body in RUN:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", body],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"
    assert (workplace / "kept.png").is_file()


def test_the_python_of_the_readme_runs(workplace, environment):
    for body in PYTHON:
        done = subprocess.run(
            [sys.executable, "-c", body],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README))))
def test_every_link_of_the_readme_leads_somewhere(target):
    assert (ROOT / target).exists()
