"""Files are hashed once, and again when they have changed."""

from __future__ import annotations

import json
import os

import pytest

from visprune.bundle import Bundle
from visprune.caches import cache_dir
from visprune.errors import BundleError
from visprune.runtime import load
from visprune.verified import verify


def damage(path):
    """Change one byte; of what `stat` shows, only the modification time changes."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_second_load_reads_nothing(tiny_copy):
    bundle = Bundle.open(tiny_copy)
    seen = []
    assert verify(bundle, lambda name, size: seen.append((name, size))) == len(bundle.manifest.files)
    assert dict(seen) == {name: record.size for name, record in bundle.manifest.files.items()}
    assert verify(bundle) == 0


def test_touched_file_is_read_again(tiny_copy):
    bundle = Bundle.open(tiny_copy)
    verify(bundle)
    os.utime(tiny_copy / "tokenizer.json", ns=(1, 1))
    assert verify(bundle) == 1


def test_altered_file(tiny_copy):
    verify(Bundle.open(tiny_copy))
    path = tiny_copy / "onnx" / "decoder_model_merged.onnx"
    damage(path)
    os.utime(path, ns=(2, 2))
    with pytest.raises(BundleError, match="was altered"):
        load(tiny_copy)
    with pytest.raises(BundleError, match="was altered"):
        load(tiny_copy)  # nothing was remembered


def test_altered_manifest_hash(tiny_copy):
    verify(Bundle.open(tiny_copy))
    path = tiny_copy / "visprune.json"
    data = json.loads(path.read_text())
    data["files"]["tokenizer.json"]["sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"tokenizer\.json was altered"):
        verify(Bundle.open(tiny_copy))


@pytest.mark.parametrize("damaged", ["{", "[" * 100_000])
def test_damaged_memory_is_ignored(damaged, tiny_copy):
    bundle = Bundle.open(tiny_copy)
    verify(bundle)
    for note in (cache_dir() / "verified").iterdir():
        note.write_text(damaged)
    assert verify(bundle) == len(bundle.manifest.files)
    assert verify(bundle) == 0


def test_unwritable_cache_is_no_error(tiny_copy, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))  # a file cannot hold a directory, not even for root
    bundle = Bundle.open(tiny_copy)
    assert verify(bundle) == verify(bundle) == len(bundle.manifest.files)


def test_load_can_skip_it(tiny_copy):
    template = tiny_copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("a:", "b:"))
    with pytest.raises(BundleError):
        load(tiny_copy)
    with load(tiny_copy, verify=False) as pipeline:
        assert pipeline.manifest.source.model == "tiny"
