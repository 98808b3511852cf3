"""Time that each method before the LLM adds to the vision tower, int8, on a CPU.

    python measurements/methods.py --work /tmp/visprune-bench

The vision tower is CLIP ViT-L/14-336, and projected tokens have the width of Qwen2-0.5B. Weights are random,
and the decoder, which is not measured, has one layer. Bundles are quantized to int8-dynamic.

A method's time is that of its vision encoder, which may have to put out attention, and of its pruner at 144
of 576 tokens. `uniform` reads nothing and computes next to nothing. A method's share is what its time is more
than that of `uniform`, divided by the time of `uniform`'s vision encoder. All methods take turns in every
round, in random order, on the same threads. Figures are medians over rounds, with the 25th and the 75th
percentile.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import transformers
from measure import pixels
from model import THREADS, clip_large, write

from visprune.bundle import Bundle
from visprune.export import export
from visprune.pruning.base import VisionPruner
from visprune.pruning.registry import BUILTIN, load_method
from visprune.quantize import quantize
from visprune.runtime.backends import backend
from visprune.runtime.backends.runner import BackendOptions, Runner, Value

KEPT, QUESTION = 144, 16
BASELINE = "uniform"


def methods() -> list[str]:
    """Return the methods that choose or make tokens after the vision tower, the baseline first."""
    found = [name for name in BUILTIN if isinstance(load_method(name)(), VisionPruner)]
    return [BASELINE, *(name for name in found if name not in (BASELINE, "none", "resize"))]


def checkpoint(work: Path) -> Path:
    """Make the checkpoint if it does not exist, and return its path."""
    text = transformers.Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=1,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=320,
    )
    return write(work / "one-layer", clip_large(), text)


def quantized(work: Path, name: str) -> Bundle:
    """Make the int8 bundle of a method if it does not exist, and return it."""
    place, whole = work / f"{name}-int8", work / f"{name}-float"
    if not place.exists():
        source = export(checkpoint(work), method=name, ratio=0.25, output=whole, verify=False)
        quantize(source, place, precision="int8-dynamic", timing=False)
    return Bundle.open(place)


class Case:
    """The graphs of one method, with inputs."""

    def __init__(self, bundle: Bundle) -> None:
        self.encoder, self.pruner = self._load(bundle, "vision_encoder"), self._load(bundle, "token_pruner")
        self.picture: dict[str, Value] = {"pixel_values": pixels()}
        taken = {spec.name for spec in bundle.manifest.graphs["token_pruner"].inputs}
        words = np.random.default_rng(1).normal(size=(1, QUESTION, 896)).astype(np.float32)
        more: dict[str, Value] = {"keep_tokens": np.array(KEPT), "question_embeds": words}
        seen = self.encoder.infer(self.picture)
        named = {"vision_features": seen["image_features"], **seen, **more}
        self.given = {name: named[name] for name in taken}

    @staticmethod
    def _load(bundle: Bundle, graph: str) -> Runner:
        return backend("cpu")(bundle, graph, BackendOptions("cpu", THREADS))

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of the vision encoder and of the pruner."""
        start = time.perf_counter()
        self.encoder.infer(self.picture)
        middle = time.perf_counter()
        self.pruner.infer(self.given)
        return middle - start, time.perf_counter() - middle


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    cases = {name: Case(quantized(args.work, name)) for name in methods()}
    for case in cases.values():
        case.seconds()
    random = np.random.default_rng(0)
    # The order is drawn anew in each round, so that no method always follows the same one.
    rounds = [
        {name: cases[name].seconds() for name in random.permutation(list(cases))} for _ in range(args.rounds)
    ]
    found = {}
    print(f"{'method':14} {'encoder ms':>10} {'pruner ms':>10} {'share of the vision time':>30}")
    for name in cases:
        more = [100 * (sum(one[name]) - sum(one[BASELINE])) / one[BASELINE][0] for one in rounds]
        encoder, pruner = np.median([one[name] for one in rounds], axis=0) * 1e3
        low, share, high = np.percentile(more, [25, 50, 75])
        found[name] = {"encoder_ms": encoder, "pruner_ms": pruner, "share": share, "from": low, "to": high}
        print(f"{name:14} {encoder:10.1f} {pruner:10.1f} {share:15.1f}% ({low:.1f}% to {high:.1f}%)")
    (args.work / "methods.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
