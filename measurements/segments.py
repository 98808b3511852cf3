"""Cost and gain of pruning inside the LLM: a merged decoder, six segments, and a FitPrune recipe, on a CPU.

    python measurements/segments.py --work /tmp/visprune-bench

One image (576 tokens) and 64 text tokens go through the runtime's own program. The bundles take turns on the
same threads, so that other load on the machine affects all alike. The results are two ratios: the time of the
prefill with the recipe against what its FLOPs promise, and decoding through six segments against decoding
through the merged decoder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from measure import TEXT_TOKENS, Summary, pixels, prompt, ratio
from model import THREADS, make

import visprune
from visprune.estimate.flops import savings
from visprune.export import export
from visprune.pruning.recipe import read_recipe
from visprune.runtime.session import Session
from visprune.runtime.vision.kept_tokens import keep_for
from visprune.runtime.vision.pictures import Picture

STEPS, TURNS, RATIO, POINTS = 8, 4, 0.4, 5


def bundles(work: Path) -> dict[str, Path]:
    """Export the bundles that do not exist; without self-check, which does not affect speed."""
    checkpoint = make(work / "checkpoint")
    recipe = work / "recipe.json"
    if not recipe.is_file():
        visprune.fit(checkpoint, ratio=RATIO, max_prune_points=POINTS, output=recipe)
    options: dict[str, dict[str, Any]] = {
        "merged": {"method": "none"},
        "six segments": {"method": "none", "segments": POINTS + 1},
        "fitprune": {"method": "fitprune", "recipe": recipe},
    }
    for name, chosen in options.items():
        if not (work / name).is_dir():
            export(checkpoint, output=work / name, verify=False, **chosen)
    print("scheme", read_recipe(recipe).scheme)
    return {name: work / name for name in options}


def decoder_ms(timings: dict[str, float]) -> float:
    """Return the milliseconds of the decoder's stages, the pruning between them included."""
    return sum(ms for name, ms in timings.items() if name.startswith(("decoder", "segment_pruner")))


def main() -> None:
    """Measure; print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    picture = Picture(pixels())
    pipelines = {name: visprune.load(path, threads=THREADS) for name, path in bundles(args.work).items()}
    prefill: dict[str, list[float]] = {name: [] for name in pipelines}
    decode: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in range(args.repeats + 1):  # the first round is the warm-up
        sessions = {}
        for name, pipeline in pipelines.items():
            session = Session(pipeline.loaded.executor, pipeline.manifest, keep_for(pipeline.manifest))
            ids = prompt(pipeline.manifest.text.image_token_id, session.image_length(picture))
            done = session.prefill(ids, [picture])
            prefill[name].append(decoder_ms(done.timings_ms))
            sessions[name] = session
        for name in pipelines:
            decode[name].append(0.0)
        for _ in range(TURNS):
            for name, session in sessions.items():
                start = time.perf_counter()
                for token in range(20, 20 + STEPS):
                    session.decode(token)
                decode[name][repeat] += (time.perf_counter() - start) * 1e3
    for what, values in (("prefill", prefill), (f"decode {TURNS * STEPS}", decode)):
        for name, ms in values.items():
            summary = Summary.of(ms[1:])
            print(f"{what:10s} {name:14s} {summary.median:9.1f} ms   spread {100 * summary.spread:3.0f}%")

    def to_merged(values: dict[str, list[float]], name: str) -> float:
        return ratio(values[name][1:], values["merged"][1:])

    found = savings(pipelines["fitprune"].manifest, text_tokens=TEXT_TOKENS)
    assert found is not None
    promised = found.sequence.pruned / found.sequence.unpruned
    results = {
        "promised prefill, fitprune / merged (F3, whole sequence)": promised,
        "prefill, fitprune / merged": to_merged(prefill, "fitprune"),
        "prefill, measured / promised": to_merged(prefill, "fitprune") / promised,
        "prefill, six segments / merged": to_merged(prefill, "six segments"),
        "decode, six segments / merged": to_merged(decode, "six segments"),
        "decode, fitprune / merged": to_merged(decode, "fitprune"),
    }
    for name, value in results.items():
        print(f"{name:58s} {value:.3f}")
    print(json.dumps({"threads": THREADS, "summary": results}))


if __name__ == "__main__":
    main()
