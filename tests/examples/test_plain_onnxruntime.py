"""The bundle's graphs in plain ONNX Runtime: the answers are those of `visprune.load`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import visprune

SOURCE = (Path(__file__).resolve().parents[2] / "examples" / "plain_onnxruntime.py").read_text("utf-8")
QUESTIONS = ("Which shape is shown?", "Which letter is shown?", "In which corner is the letter?")


def test_it_is_short_and_uses_nothing_of_visprune():
    names = {
        (node.names[0].name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert names <= {"jinja2", "json", "numpy", "onnxruntime", "pathlib", "PIL", "re", "sys", "tokenizers"}
    assert len(SOURCE.splitlines()) < 60


@pytest.mark.parametrize(("picture", "question"), list(enumerate(QUESTIONS)))
def test_it_answers_as_visprune_does(picture, question, bundle, pictures, example):
    folder = bundle("none")
    done = example("plain_onnxruntime", folder, pictures[picture], question)
    assert done.returncode == 0, done.stderr
    with visprune.load(folder) as pipeline:
        assert done.stdout == pipeline.generate(pictures[picture], question).text + "\n"
