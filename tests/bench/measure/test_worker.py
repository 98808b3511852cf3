"""A worker process: its replies, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from visprune.bench.measure.protocol import Contender
from visprune.bench.measure.worker_process import Worker
from visprune.errors import BundleError, InputError, UnsupportedError
from visprune.runtime import load


@pytest.fixture
def start(tmp_path):
    """A function that starts a worker of a bundle; all are ended after the test."""
    workers = []

    def begin(path, **fields) -> Worker:
        folder = tmp_path / f"worker{len(workers)}"
        folder.mkdir()
        role = fields.pop("role", "given")
        workers.append(Worker(Contender("row", role, str(path), **fields), folder))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.__exit__(None, None, None)


def test_a_process_runs_the_bundle_as_the_runtime_does(start, tiny_bundle, work):
    worker = start(tiny_bundle, keep_tokens=7)
    assert worker.load(work).load > 0
    done = worker.repeat()
    with load(tiny_bundle, threads=1) as pipeline:
        answer = pipeline.generate(Path(work.images[0]), work.prompt, max_new_tokens=3, keep_tokens=7)
    assert (done.visual_tokens, done.layer_tokens) == (16, (7, 7))
    assert done.text_tokens == answer.tokens_in - 7
    assert done.cache_bytes == 2 * 2 * 4 * 4 * 2 * answer.tokens_in  # K and V, heads, size, float32, layers
    stages = done.repetition.stages
    assert list(stages) == ["preprocess", "vision_encoder", "token_pruner", "embedding", "prefill", "other"]
    assert sum(stages.values()) == pytest.approx(done.repetition.first_token, rel=1e-6)
    assert done.memory_bytes > 10_000_000
    assert len(worker.overlays()) == 1


def test_every_row_generates_as_many_tokens_although_its_answer_ended(start, tiny_copy, edit_manifest, work):
    edit_manifest(tiny_copy, "decoder", eos_token_ids=tuple(range(259)))
    with load(tiny_copy, threads=1) as pipeline:
        assert pipeline.generate(None, "Hi", max_new_tokens=5).finish_reason == "eos"
    worker = start(tiny_copy)
    worker.load(replace(work, max_new_tokens=5))
    assert worker.repeat().new_tokens == 5


def test_a_checkpoint_whose_placeholder_has_no_row_in_the_table(start, work, tmp_path):
    """One in LLaVA's original format; transformers looks the placeholder up before it replaces it."""
    pytest.importorskip("sentencepiece")
    from original import Original, write

    written = write(tmp_path / "model", Original(inside=False, storage="pickle"))
    worker = start(written.path, role="pytorch", dtype="float32")
    assert worker.load(work).load > 0
    done = worker.repeat()
    assert done.visual_tokens == 16
    assert done.new_tokens == work.max_new_tokens


def test_what_goes_wrong_is_told_with_the_name_of_the_row(start, tiny_copy, work):
    (tiny_copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"row: .*tokenizer.json is missing"):
        start(tiny_copy).load(work)


def test_a_prompt_that_is_too_long_is_told(start, tiny_bundle, work):
    worker = start(tiny_bundle)
    worker.load(replace(work, prompt="long " * 100))
    with pytest.raises(InputError, match="context"):
        worker.repeat()


def test_a_process_that_is_killed_is_told(start, tiny_bundle, work):
    worker = start(tiny_bundle)
    worker.load(work)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UnsupportedError, match="row was ended by SIGKILL") as found:
        worker.repeat()
    assert "memory" in found.value.hint


_PARENT = """
import sys, time
from pathlib import Path
from visprune.bench.measure.worker_process import Worker
from visprune.bench.measure.protocol import Contender
worker = Worker(Contender("row", "given", "nowhere"), Path(sys.argv[1]))
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_process_ends_with_its_parent(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while (
        Path(f"/proc/{pid}/cmdline").exists() and b"bench.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
