"""Error of plans: rates are calibrated on one model, and the times of other models are predicted with them.

    python measurements/planned.py --work /tmp/visprune-bench

On this CPU, in float32, with random weights. Three models run an image and 64 text tokens through the
runtime, at 576 and at 144 visual tokens: the model of most measurements here, a wide and shallow model, and a
model whose heads share no keys. All are loaded at once and take turns, so that other load on the machine
affects them alike. Figures are medians over rounds, with the interquartile range as a share of the median.
Rates are fitted to the first model alone (`visprune.estimate.measured_rates`); `visprune.estimate.roofline`
predicts all.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from measure import TEXT_TOKENS, Summary, pixels, processor, prompt
from model import THREADS, clip_large, make, write

import visprune
from visprune.estimate.measured_rates import Observation, fit
from visprune.estimate.planned_model import bundle_model
from visprune.estimate.roofline import Stage, StageWork, estimate, stage_works
from visprune.export import export
from visprune.runtime.session import Session
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.pictures import Picture

KEPT, STEPS, LIMIT = (576, 144), 16, 0.25

_STAGES: dict[str, Stage] = {"vision_encoder": "vision", "decoder_model_merged": "prefill"}


def clip(width: int, layers: int, heads: int) -> transformers.CLIPVisionConfig:
    """Return the configuration of a vision tower that takes the images of CLIP ViT-L/14-336."""
    config = clip_large()
    config.update({"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers})
    config.num_attention_heads = heads
    return config


def checkpoints(work: Path) -> dict[str, Path]:
    """Make the three models that do not exist yet; the calibration uses the first."""
    wide = transformers.Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=32000,
        rope_theta=1000000.0,
    )
    llama = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    return {
        "CLIP-L, Qwen2-0.5B": make(work / "checkpoint"),
        "ViT 768 x 12, Qwen2 1536 x 12": write(work / "plan-wide", clip(768, 12, 12), wide),
        "ViT 1280 x 8, Llama 2048 x 8": write(work / "plan-llama", clip(1280, 8, 16), llama),
    }


def bundle(checkpoint: Path) -> Path:
    """Export a checkpoint unless that was done, and return the path of the bundle."""
    path = checkpoint.with_name(f"{checkpoint.name}-uniform")
    if not path.is_dir():
        export(checkpoint, method="uniform", output=path, verify=False)
    return path


def repeat(pipeline: visprune.runtime.Pipeline, kept: int) -> dict[Stage, float]:
    """Run a prefill and some decoding; return the seconds of each stage, for decoding of one token."""
    manifest, executor = pipeline.manifest, pipeline.loaded.executor
    session, picture = Session(executor, manifest, Keep(kept)), Picture(pixels())
    done = session.prefill(prompt(manifest.text.image_token_id, session.image_length(picture)), [picture])
    seconds = {_STAGES[graph]: ms / 1e3 for graph, ms in done.timings_ms.items() if graph in _STAGES}
    token, start = int(done.logits.argmax()), time.perf_counter()
    for _ in range(STEPS):
        token = int(session.decode(token).argmax())
    return seconds | {"decode": (time.perf_counter() - start) / STEPS}


@dataclass(frozen=True, slots=True)
class Line:
    """Measurement of one stage of one model with one number of tokens."""

    model: str
    kept: int
    work: StageWork
    seconds: Summary


def measure(pipelines: dict[str, visprune.runtime.Pipeline], rounds: int) -> list[Line]:
    """Measure all models in turns, after a warm-up round."""
    spent: dict[tuple[str, int, Stage], list[float]] = {}
    for number in range(1 + rounds):
        for name, pipeline in pipelines.items():
            for kept in KEPT:
                for stage, seconds in repeat(pipeline, kept).items():
                    if number > 0:
                        spent.setdefault((name, kept, stage), []).append(seconds)
    lines = []
    for (name, kept, stage), seconds in spent.items():
        model = bundle_model(pipelines[name].manifest, name, keep_tokens=kept)
        done = stage_works(model.sizes, model.tokens(TEXT_TOKENS), STEPS, "fp32", 4)
        lines += [Line(name, kept, work, Summary.of(seconds)) for work in done if work.stage == stage]
    return lines


def main() -> None:
    """Export, measure, fit and predict; print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: one round has no spread")
    bundles = {name: bundle(path) for name, path in checkpoints(args.work).items()}
    pipelines = {name: visprune.load(path, threads=THREADS) for name, path in bundles.items()}
    lines = measure(pipelines, args.rounds)
    first = next(iter(bundles))
    rates = fit([Observation(line.work, line.seconds.median) for line in lines if line.model == first])

    print(f"{processor()}, {THREADS} threads; calibrated on {first}:")
    print(f"{rates.linear / 1e9:.0f} and {rates.attention / 1e9:.0f} GFLOP/s, {rates.bytes / 1e9:.1f} GB/s\n")
    print(f"{'model':32s}{'tokens':>7s}  {'stage':8s}{'measured, ms':>18s}{'predicted':>11s}{'error':>7s}")
    worst, rows = 0.0, []
    for line in lines:
        predicted = estimate(line.work, rates).seconds
        error = predicted / line.seconds.median - 1
        cells = (
            f"{1e3 * line.seconds.median:.1f} ({100 * line.seconds.spread:.0f}%)",
            f"{1e3 * predicted:.1f}",
        )
        print(
            f"{line.model:32s}{line.kept:7d}  {line.work.stage:8s}{cells[0]:>18s}{cells[1]:>11s}{error:+7.0%}"
        )
        rows.append(asdict(line) | {"predicted": predicted})
        if line.model != first and line.work.stage != "vision":
            worst = max(worst, abs(error))
    verdict = "within" if worst <= LIMIT else "NOT within"
    print(f"\nprefill and decoding of the other models: at most {worst:.0%} off, {verdict} {LIMIT:.0%}")
    print(json.dumps({"threads": THREADS, "rates": asdict(rates), "worst": worst, "lines": rows}))


if __name__ == "__main__":
    main()
