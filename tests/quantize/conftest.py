"""Bundles to quantize, exported once, and calibration files for bundles of other models than the demo."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from checkpoints import checkpoint, pictures
from tracing import _quick_traces

from visprune.bundle import Bundle
from visprune.quantize import quantize

__all__ = ["_quick_traces", "checkpoint", "pictures"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo model, with half of its visual tokens pruned before the LLM."""
    pytest.importorskip("torch")
    from visprune.export import export

    return export(
        method="fopru-rank", ratio=0.5, verify=False, output=tmp_path_factory.mktemp("float") / "demo"
    )


@pytest.fixture(scope="session")
def demo_in(demo, tmp_path_factory):
    """The demo bundle quantized as a whole, once for each precision: `demo_in("int8") -> Bundle`."""
    made = {}

    def make(precision):
        if precision not in made:
            output = tmp_path_factory.mktemp("made") / precision
            made[precision] = quantize(demo, output, precision=precision, samples=8, timing=False)
        return made[precision]

    return make


@pytest.fixture
def tiny(tiny_bundle):
    """The bundle made by hand, which is quick to quantize: its graphs are tiny."""
    return Bundle.open(tiny_bundle)


@pytest.fixture
def jsonl(tmp_path, picture):
    """Write a calibration file: `jsonl(lines)`, by default of six pictures."""

    def write(lines=None, name="images.jsonl", pictures=6):
        for seed in range(pictures):
            picture(seed).save(tmp_path / f"{seed}.png")
        if lines is None:
            lines = [{"image": f"{seed}.png", "prompt": f"what is {seed}?"} for seed in range(pictures)]
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def lines(jsonl, pictures, tmp_path):
    """A calibration file of six samples with three images, larger than the input of the tiny models."""
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"wide{index}.png")
    return jsonl([{"image": f"wide{i % 3}.png", "prompt": f"What is {i}?"} for i in range(6)], pictures=0)


@pytest.fixture(scope="session")
def report():
    """Read the report of a quantized bundle: `report(bundle) -> dict`."""

    def read(bundle):
        return json.loads(bundle.file(bundle.manifest.quantization.report).read_text(encoding="utf-8"))

    return read


@pytest.fixture
def refused(tmp_path):
    """Quantize, expect an error of a kind whose text matches, and check that no file was left."""

    def check(error, match, bundle, **options):
        there = set(tmp_path.iterdir())
        with pytest.raises(error, match=match) as caught:
            quantize(bundle, tmp_path / "made", **({"precision": "int8", "timing": False} | options))
        assert caught.value.hint
        assert set(tmp_path.iterdir()) == there
        return caught.value

    return check
