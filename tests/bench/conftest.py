"""The tiny checkpoints, and reports made of numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import checkpoint
from tracing import _collected, _quick_traces

from visprune.bench.report.report import (
    BASELINES,
    SCHEMA_VERSION,
    Accuracy,
    BenchReport,
    Flops,
    Machine,
    NotMade,
    Repetition,
    Row,
    Workload,
)
from visprune.demo.held_out import wilson

__all__ = ["_collected", "_quick_traces", "checkpoint"]

LAYERS = 4


@pytest.fixture
def work(picture, tmp_path) -> Workload:
    """A tiny piece of work: three tokens, two rounds."""
    path = tmp_path / "picture.png"
    picture(0).save(path)
    return Workload((str(path),), "What is it?", 3, threads=1, rounds=2, warm_up=1)


@pytest.fixture
def row() -> Callable[..., Row]:
    """A function that makes a row whose times are drawn around a median."""

    def make(
        name: str,
        ms: float = 10.0,
        noise: float = 0.02,
        rounds: int = 10,
        seed: int = 0,
        right: int | None = None,
        **fields,
    ) -> Row:
        times = ms * np.exp(noise * np.random.default_rng(seed).standard_normal(rounds))
        kept = fields.pop("kept", 144)
        repetitions = tuple(
            Repetition(
                float(t),
                {
                    "preprocess": 0.1 * t,
                    "vision_encoder": 0.4 * t,
                    "token_pruner": 0.1 * t,
                    "embedding": 0.02 * t,
                    "prefill": 0.35 * t,
                    "other": 0.03 * t,
                },
                float(t) / 10,
            )
            for t in times
        )
        settings = {
            "role": "given",
            "path": "/somewhere",
            "model": "demo",
            "weights": "0" * 64,
            "method": "fopru-rank",
            "precision": "fp32",
            "visual_tokens": 144,
            "layer_tokens": (kept,) * LAYERS,
            "text_tokens": 12,
            "new_tokens": 8,
            "disk_bytes": 10_700_000,
            "load": 120.0,
            "memory_bytes": 106_000_000,
            "device_bytes": None,
            "cache_bytes": 4608 * kept,
            "flops": Flops("F3", 10**7 * kept, 10**9 + 10**7 * kept, 144 * 10**7, 10**9 + 144 * 10**7),
            "accuracy": None if right is None else Accuracy(right, 500, *wilson(right, 500), "500 questions"),
        }
        return Row(name=name, repetitions=repetitions, **(settings | fields))

    return make


@pytest.fixture
def report() -> Callable[..., BenchReport]:
    """A function that puts rows into a report."""

    def make(*rows: Row, notes: tuple[str, ...] = (), not_made: tuple[NotMade, ...] = ()) -> BenchReport:
        machine = Machine(
            "A processor", 2, 24 * 10**9, "Linux, x86_64", "3.11.7", {"visprune": "0"}, None, "no counter"
        )
        work = Workload(("scene.png",), "What <is> it & why?", 8, threads=2, rounds=10)
        return BenchReport(SCHEMA_VERSION, "2026-01-01T00:00:00+00:00", machine, work, rows, not_made, notes)

    return make


@pytest.fixture
def large_report(row, report) -> BenchReport:
    """Five methods by three ratios by two precisions: one inside the LLM, and two of them baselines."""
    rows, rng = [], np.random.default_rng(3)
    for precision, speed in (("fp32", 1.0), ("int8", 0.55)):
        rows.append(
            row(
                f"none, {precision}",
                15 * speed,
                role="unpruned",
                method="none",
                precision=precision,
                right=480,
            )
        )
        for method in ("fopru-rank", "fopru-row", "fitprune", "random", "resize"):
            for ratio, kept in ((50, 72), (25, 36), (11, 16)):
                fields = {"method": method, "precision": precision, "kept": kept}
                if method == "fitprune":
                    fields["layer_tokens"] = (144, kept + 20, kept, kept)
                if method in BASELINES:
                    fields["role"] = method
                ms = speed * (9 + 6 * kept / 144) * {"fitprune": 1.1, "resize": 0.6}.get(method, 1.0)
                right = int(480 - (144 - kept) * rng.uniform(0.2, 2.2))
                seed = len(rows)
                rows.append(
                    row(f"{method} {ratio}%, {precision}", ms, 0.03, seed=seed, right=right, **fields)
                )
    missing = NotMade("fitprune 11%, fp32", "0.11 of the visual work cannot be reached. Ask for more.")
    return report(*rows, notes=("Two rows are noted.",), not_made=(missing,))


@pytest.fixture
def somewhere_else(tmp_path, monkeypatch) -> Path:
    """An empty directory to stand in."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
