"""Pages of mapped files that are dropped from memory."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest

from visprune.bundle import Bundle
from visprune.runtime.backends import ort_cpu
from visprune.runtime.backends.mapped import drop_pages
from visprune.runtime.backends.runner import BackendOptions

if sys.platform != "linux":
    pytest.skip("pages are dropped on Linux only", allow_module_level=True)

SIZE = 1 << 20


def resident(file):
    """KB of a file in this process's memory."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return sum(map(int, re.findall(rf"{re.escape(str(file))}\n(?:\w+:.*\n)*?Rss: +(\d+) kB", text)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights (1).bin"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def mapped(file):
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as found:
        assert sum(found[::4096]) == 0
        assert resident(file) == SIZE >> 10
        yield found


def test_pages_are_dropped_and_read_again(mapped, file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    drop_pages(link)
    assert resident(file) == 0
    assert mapped[:] == file.read_bytes()


def test_what_was_written_stays(mapped, file):
    mapped[5000] = 7
    drop_pages(file)
    assert mapped[5000] == 7
    assert mapped[4999] == 4999 % 256


def test_other_files_stay(mapped, file):
    drop_pages(file.with_name("another"))
    drop_pages(Path("/dev/zero"))
    assert resident(file) == SIZE >> 10


def test_an_open_graph_has_no_page_of_its_weights_in_memory(demo_bundle, tmp_path):
    pytest.importorskip("onnx_ir")
    from visprune.quantize import quantize

    # Scales of `MatMulNBits` are in ONNX Runtime's copy of the weights, and stay mapped.
    bundle: Bundle = quantize(demo_bundle, tmp_path / "int4", precision="int4", timing=False)
    for name, graph in bundle.manifest.graphs.items():
        with ort_cpu.open_cpu(bundle, name, BackendOptions("cpu", 1)):
            text = Path("/proc/self/maps").read_text(encoding="utf-8")
            assert name == "embedding" or str(bundle.file(graph.data)) in text
            assert resident(bundle.file(graph.data)) == 0
