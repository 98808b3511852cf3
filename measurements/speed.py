"""Speed of graphs on a CPU against transformers (sdpa, float32).

    python measurements/speed.py --work /tmp/visprune-bench

Every figure is a median over repetitions. All cases take turns on the same threads, so that other load on the
machine affects all alike. The spread is the interquartile range as a share of the median.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measure import TEXT_TOKENS, Summary, pixels
from model import THREADS, make
from numpy.typing import NDArray

from visprune.bundle import Bundle
from visprune.export import export
from visprune.runtime.backends import backend
from visprune.runtime.backends.runner import BackendOptions, Runner, Value

Cases = dict[str, Callable[[], object]]

VISUAL, KEPT, STEPS = 576, 144, 16


def load(bundle: Bundle, graph: str) -> Runner:
    """Load one graph on the CPU, with as many threads as PyTorch has."""
    return backend("cpu")(bundle, graph, BackendOptions("cpu", THREADS))


def time_all(cases: Cases, repeats: int) -> dict[str, Summary]:
    """Return the seconds of each case, measured in rounds of all cases after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: Summary.of(values) for name, values in seconds.items()}


def decoder_feeds(
    bundle: Bundle, embeds: Value, start: int, past: dict[str, Value] | None
) -> dict[str, Value]:
    """Return the inputs of one call of the decoder."""
    facts = bundle.manifest.decoder
    empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_dim), np.float32)
    length = embeds.shape[1] if isinstance(embeds, np.ndarray) else 1
    feeds: dict[str, Value] = {
        "inputs_embeds": embeds,
        "position_ids": np.arange(start, start + length, dtype=np.int64)[None],
    }
    for spec in bundle.manifest.graphs["decoder_model_merged"].inputs[2:]:
        name = spec.name.replace("past_key_values", "present")
        feeds[spec.name] = empty if past is None else past[name]
    return feeds


def vision_cases(whole: Bundle, pruned: Bundle, model: Any, picture: NDArray[np.float32]) -> Cases:
    """Return the cases of the vision tower and the projector, with and without scores."""
    encoder, scored_encoder = load(whole, "vision_encoder"), load(pruned, "vision_encoder")
    projector, pruner = load(whole, "token_pruner"), load(pruned, "token_pruner")
    scored = scored_encoder.infer({"pixel_values": picture})
    features: dict[str, Value] = {"vision_features": scored["image_features"]}
    scores: dict[str, Value] = {"attention_received": scored["attention_received"]}
    tensor = torch.from_numpy(picture)
    return {
        "vision and projector, transformers": lambda: model.get_image_features(tensor),
        "vision": lambda: encoder.infer({"pixel_values": picture}),
        "vision, scored": lambda: scored_encoder.infer({"pixel_values": picture}),
        "projector at 576": lambda: projector.infer(features | {"keep_tokens": np.array(VISUAL)}),
        "projector at 144, first tokens": lambda: projector.infer(features | {"keep_tokens": np.array(KEPT)}),
        "prune and project to 144": lambda: pruner.infer(features | scores | {"keep_tokens": np.array(KEPT)}),
    }


def decoder_cases(whole: Bundle, model: Any) -> Cases:
    """Return the cases of the decoder: prefill with all and a quarter of the visual tokens, and decoding."""
    decoder = load(whole, "decoder_model_merged")
    rng = np.random.default_rng(0)
    width = model.config.text_config.hidden_size
    embeds = {
        n: rng.normal(size=(1, n + TEXT_TOKENS, width)).astype(np.float32) * 0.02 for n in (VISUAL, KEPT)
    }
    one = embeds[VISUAL][:, :1]
    language = model.model.language_model

    def reference_prefill(n: int) -> transformers.DynamicCache:
        cache = transformers.DynamicCache()
        out = language(inputs_embeds=torch.from_numpy(embeds[n]), past_key_values=cache, use_cache=True)
        model.lm_head(out.last_hidden_state[:, -1:])
        return cache

    def prefill(n: int) -> dict[str, Value]:
        return decoder.infer(decoder_feeds(whole, embeds[n], 0, None))

    def reference_decode() -> None:
        cache = transformers.DynamicCache(reference_past)
        for _ in range(STEPS):
            out = language(inputs_embeds=torch.from_numpy(one), past_key_values=cache, use_cache=True)
            model.lm_head(out.last_hidden_state)

    def decode() -> None:
        cache = past
        for step in range(STEPS):
            cache = decoder.infer(decoder_feeds(whole, one, VISUAL + TEXT_TOKENS + step, cache))

    past = prefill(VISUAL)
    reference_past = [(layer.keys, layer.values) for layer in reference_prefill(VISUAL).layers]
    return {
        f"prefill {VISUAL}+{TEXT_TOKENS}, transformers": lambda: reference_prefill(VISUAL),
        f"prefill {VISUAL}+{TEXT_TOKENS}": lambda: prefill(VISUAL),
        f"prefill {KEPT}+{TEXT_TOKENS}, transformers": lambda: reference_prefill(KEPT),
        f"prefill {KEPT}+{TEXT_TOKENS}": lambda: prefill(KEPT),
        f"decode {STEPS} tokens, transformers": reference_decode,
        f"decode {STEPS} tokens": decode,
    }


def summarise(seconds: dict[str, float]) -> dict[str, float]:
    """Return the ratios that the goals are stated in."""
    full, short = f"prefill {VISUAL}+{TEXT_TOKENS}", f"prefill {KEPT}+{TEXT_TOKENS}"
    decode = f"decode {STEPS} tokens"
    ours = seconds["vision"] + seconds["projector at 576"]
    scoring = seconds["vision, scored"] - seconds["vision"]
    selection = seconds["prune and project to 144"] - seconds["projector at 144, first tokens"]
    promised = (VISUAL + TEXT_TOKENS) / (KEPT + TEXT_TOKENS)
    return {
        "vision, transformers / visprune": seconds["vision and projector, transformers"] / ours,
        "prefill, transformers / visprune": seconds[f"{full}, transformers"] / seconds[full],
        "decode, transformers / visprune": seconds[f"{decode}, transformers"] / seconds[decode],
        "scoring and pruning / vision": (scoring + selection) / seconds["vision"],
        "prefill speed-up / promised by the token count": seconds[full] / seconds[short] / promised,
    }


def main() -> None:
    """Export and measure; print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    checkpoint = make(args.work / "checkpoint")
    bundles = {}
    for method in ("uniform", "fopru-rank"):
        path = args.work / method
        if not path.is_dir():
            export(checkpoint, method=method, output=path, verify=False)
        bundles[method] = Bundle.open(path)
    whole, pruned = bundles["uniform"], bundles["fopru-rank"]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()

    results = time_all(vision_cases(whole, pruned, model, pixels()), args.repeats)
    results |= time_all(decoder_cases(whole, model), args.repeats)
    for name, seconds in results.items():
        print(f"{name:40s} {1000 * seconds.median:9.1f} ms   spread {100 * seconds.spread:3.0f}%")
    summary = summarise({name: seconds.median for name, seconds in results.items()})
    for name, value in summary.items():
        print(f"{name:50s} {value:.3f}")
    print(json.dumps({"threads": THREADS, "summary": summary}))


if __name__ == "__main__":
    main()
