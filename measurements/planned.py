"""Does a plan that was calibrated on one model predict others? On this CPU, in float32, random weights.

    python measurements/planned.py --work /tmp/visprune-bench

Three models with an image and 64 text tokens, at 576 and at 144 visual tokens, through the runtime: the one
nearly every benchmark here uses, one that is wide and shallow, and one without shared keys. All are loaded at
once and take turns, so that what else the machine does hits them alike; medians over rounds, with the
interquartile range as a share. Rates are fitted to the first model alone
(`visprune.estimate.measured_rates`), and `visprune.estimate.roofline` predicts all.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import TEXT_TOKENS, Middle, pixels, processor, prompt
from model import THREADS, clip_large, make, tokenizer, write_processor

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
    """A tower for the pictures of CLIP ViT-L/14-336."""
    config = clip_large()
    config.update({"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers})
    config.num_attention_heads = heads
    return config


def write(path: Path, vision: Any, text: Any) -> Path:
    """Write a checkpoint unless it is there already; weights have seed 0."""
    if (path / "config.json").is_file():
        return path
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer().convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    write_processor(path)
    return path


def checkpoints(work: Path) -> dict[str, Path]:
    """The three models, the first of which is calibrated on."""
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
    """Its export, unless it is there already."""
    path = checkpoint.with_name(f"{checkpoint.name}-uniform")
    if not path.is_dir():
        export(checkpoint, method="uniform", output=path, verify=False)
    return path


def repeat(pipeline: visprune.Pipeline, kept: int) -> dict[Stage, float]:
    """Seconds of each stage; of decoding, of a token."""
    manifest, executor = pipeline.manifest, pipeline._model.executor
    session, picture = Session(executor, manifest, Keep(kept)), Picture(pixels())
    done = session.prefill(prompt(manifest.text.image_token_id, session.image_length(picture)), [picture])
    seconds = {_STAGES[graph]: ms / 1e3 for graph, ms in done.timings_ms.items() if graph in _STAGES}
    token, start = int(done.logits.argmax()), time.perf_counter()
    for _ in range(STEPS):
        token = int(session.decode(token).argmax())
    return seconds | {"decode": (time.perf_counter() - start) / STEPS}


@dataclass(frozen=True, slots=True)
class Line:
    """One stage of one model with one number of tokens."""

    model: str
    kept: int
    work: StageWork
    seconds: Middle


def measure(pipelines: dict[str, visprune.Pipeline], rounds: int) -> list[Line]:
    """All of them in turns, after a round to warm up."""
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
        lines += [Line(name, kept, work, Middle.of(seconds)) for work in done if work.stage == stage]
    return lines


def main() -> None:
    """Export, measure, fit, predict; print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: one has no spread")
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
