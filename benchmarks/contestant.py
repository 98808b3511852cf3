"""A process that holds one model and repeats on demand: what `quantized.py` drives over a pipe.

    python benchmarks/contestant.py bundle PATH THREADS
    python benchmarks/contestant.py bfloat16 PATH THREADS

It answers with a line of JSON once the model is loaded, and to every line it is sent: its memory, and the
milliseconds of one repetition. In between it is blocked on the pipe.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from measure import Memory, pixels, prompt

Repeat = Callable[[], dict[str, float]]

STEPS = 16
"""Tokens that are decoded after the first."""

_STAGES = {"vision_encoder": "vision", "token_pruner": "prune", "embedding": "embed"}  # others are prefill


def elapsed(start: float) -> float:
    """Milliseconds."""
    return (time.perf_counter() - start) * 1e3


def bundle(path: str, threads: int) -> Repeat:
    """A bundle in the runtime, from pixels and token ids on; each repetition is a new conversation."""
    import visprune
    from visprune.runtime.keep import keep_for
    from visprune.runtime.pictures import Picture
    from visprune.runtime.session import Session

    pipeline = visprune.load(path, threads=threads)
    manifest, executor = pipeline.manifest, pipeline._model.executor
    keep, picture = keep_for(manifest), Picture(pixels())

    def repeat() -> dict[str, float]:
        session = Session(executor, manifest, keep)
        ids = prompt(manifest.text.image_token_id, session.image_length(picture))
        start = time.perf_counter()
        done = session.prefill(ids, [picture])
        token = int(done.logits.argmax())
        ms = {"first token": elapsed(start)}
        for graph, spent in done.timings_ms.items():
            stage = _STAGES.get(graph, "prefill")
            ms[stage] = ms.get(stage, 0.0) + spent
        start = time.perf_counter()
        for _ in range(STEPS):
            token = int(session.decode(token).argmax())
        return ms | {"decode": elapsed(start) / STEPS}

    return repeat


def transformers_model(path: str, dtype: str, threads: int) -> Repeat:
    """The checkpoint in transformers, with all of its visual tokens; the same stages, by their modules."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    width = getattr(torch, dtype)
    auto = transformers.LlavaForConditionalGeneration
    model = auto.from_pretrained(path, dtype=width, attn_implementation="sdpa").eval()
    visual_tokens = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    ids = torch.tensor([prompt(model.config.image_token_id, visual_tokens)])
    picture = torch.from_numpy(pixels()).to(width)
    spent = _stage_times(
        {
            "vision": [model.model.vision_tower],
            "prune": [model.model.multi_modal_projector],
            "embed": [model.get_input_embeddings()],
            "prefill": [model.model.language_model, model.lm_head],
        }
    )

    def repeat() -> dict[str, float]:
        cache = transformers.DynamicCache(config=model.config.text_config)
        spent.clear()
        start = time.perf_counter()
        out = model(input_ids=ids, pixel_values=picture, past_key_values=cache, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        ms = {"first token": elapsed(start), **spent}
        start = time.perf_counter()
        for _ in range(STEPS):
            out = model(input_ids=token, past_key_values=cache, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return ms | {"decode": elapsed(start) / STEPS}

    return repeat


def _stage_times(stages: dict[str, list[Any]]) -> dict[str, float]:
    """Where the milliseconds spent in the modules of each stage will be added up."""
    spent: dict[str, float] = {}
    starts: dict[str, float] = {}

    def watch(stage: str, module: Any) -> None:
        def begin(*_: object) -> None:
            starts[stage] = time.perf_counter()

        def end(*_: object) -> None:
            spent[stage] = spent.get(stage, 0.0) + elapsed(starts[stage])

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    for stage, modules in stages.items():
        for module in modules:
            watch(stage, module)
    return spent


def main() -> None:
    """Load, then repeat until the pipe is closed."""
    kind, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # what a library prints is no reply
        repeat = bundle(path, threads) if kind == "bundle" else transformers_model(path, kind, threads)
        gc.collect()
        print(json.dumps({"memory": asdict(Memory.now())}), file=replies, flush=True)
        for _ in sys.stdin:
            ms = repeat()
            print(json.dumps({"ms": ms, "memory": asdict(Memory.now())}), file=replies, flush=True)


if __name__ == "__main__":
    main()
