"""Questions to ask: of the demo model, with a bundle that answers some of them wrong, and of the tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import checkpoint
from tracing import _collected, _quick_traces

from visprune.demo import held_out
from visprune.evaluation import read_questions

__all__ = ["_collected", "_quick_traces", "checkpoint"]

COUNT = 40


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """questions.jsonl of 40 held-out scenes."""
    folder = tmp_path_factory.mktemp("questions")
    held_out.main([str(folder), "--questions", str(COUNT)])
    return folder / "questions.jsonl"


@pytest.fixture
def write(tmp_path, picture):
    """A function that writes a JSONL file of some lines, objects or texts, beside the picture a.png."""

    def write(*lines, name="questions.jsonl"):
        picture(0).save(tmp_path / "a.png")
        path = tmp_path / name
        text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def asked(write):
    """A function that gives so many questions to the tiny model."""

    def asked(count):
        lines = [{"image": "a.png", "question": f"What is {n}?", "answers": ["x"]} for n in range(count)]
        return read_questions(write(*lines))

    return asked
