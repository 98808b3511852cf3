"""A subprocess that holds one model and repeats on demand; `rounds.py` starts it and sends it requests.

    python measurements/contestant.py bundle PATH [--provider cuda] [--ratio 1.0]
    python measurements/contestant.py bundle PATH --provider openvino
    python measurements/contestant.py transformers PATH [--dtype float16] [--device cuda] [--compiled]
    python measurements/contestant.py llama PATH --types Q8_0+Q4_0

Requests are lines on stdin, and replies are lines of JSON on stdout. The first reply, once the model is
loaded, has the memory of the process. The reply to each request has its memory, and the milliseconds of one
repetition; if the request is "answer", also the logits and the new tokens. Between requests the process waits
for stdin.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import Memory, pixels, prompt
from repetition import Contender, Repeat, Repetition, elapsed

_STAGES = {
    "vision_encoder": "vision",
    "token_pruner": "prune",
    "embedding": "embed",
}  # other graphs are "prefill"


def bundle(args: argparse.Namespace) -> Contender:
    """Load a bundle; a repetition is a new conversation that starts with pixels and token ids."""
    import visprune
    from visprune.runtime.backends import PROVIDERS
    from visprune.runtime.backends.runner import to_numpy
    from visprune.runtime.loading import threads_for
    from visprune.runtime.session import Session
    from visprune.runtime.vision.kept_tokens import keep_for
    from visprune.runtime.vision.pictures import Picture

    PROVIDERS["openvino"] = "openvino_runner:open_openvino"
    threads = threads_for(args.provider, args.threads)
    pipeline = visprune.load(args.path, provider=args.provider, threads=threads)
    manifest, executor = pipeline.manifest, pipeline.loaded.executor
    keep, picture = keep_for(manifest, ratio=args.ratio), Picture(pixels())

    def repeat() -> Repetition:
        session = Session(executor, manifest, keep)
        ids = prompt(manifest.text.image_token_id, session.image_length(picture))
        start = time.perf_counter()
        done = session.prefill(ids, [picture])
        tokens = [int(done.logits.argmax())]
        ms = {"first token": elapsed(start)}
        for graph, spent in done.timings_ms.items():
            stage = _STAGES.get(graph, "prefill")
            ms[stage] = ms.get(stage, 0.0) + spent
        start = time.perf_counter()
        for _ in range(args.steps):
            tokens.append(int(session.decode(tokens[-1]).argmax()))
        ms["decode"] = elapsed(start) / args.steps
        return Repetition(to_numpy(done.logits).reshape(-1), tokens, ms)

    return Contender(repeat)


def transformers_model(args: argparse.Namespace) -> Contender:
    """Load a checkpoint in transformers; it sees all visual tokens, and its modules give the same stages."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    width = getattr(torch, args.dtype)
    auto = transformers.LlavaForConditionalGeneration
    model = auto.from_pretrained(args.path, dtype=width, attn_implementation="sdpa").eval().to(args.device)
    visual_tokens = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    ids = torch.tensor([prompt(model.config.image_token_id, visual_tokens)]).to(args.device)
    picture = torch.from_numpy(pixels()).to(args.device, width)
    stages = Stages(torch.cuda.synchronize if args.device == "cuda" else lambda: None)
    stages.watch("vision", model.model.vision_tower)
    stages.watch("prune", model.model.multi_modal_projector)
    stages.watch("embed", model.get_input_embeddings())
    stages.watch("prefill", model.model.language_model, model.lm_head)
    inputs = {"input_ids": ids, "pixel_values": picture}
    if args.compiled:
        return Contender(_compiled(model, inputs, stages, args.steps))

    def repeat() -> Repetition:
        cache = transformers.DynamicCache(config=model.config.text_config)
        with stages:
            start = time.perf_counter()
            out = model(**inputs, past_key_values=cache, logits_to_keep=1)
            logits = out.logits[0, -1]
            token = logits.argmax(-1).reshape(1, 1)
            tokens = [int(token)]
            ms = {"first token": elapsed(start), **stages.spent}
        start = time.perf_counter()
        for _ in range(args.steps):
            out = model(input_ids=token, past_key_values=cache, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))
        return Repetition(logits, tokens, ms | {"decode": elapsed(start) / args.steps})

    return Contender(repeat)


def llama_server(args: argparse.Namespace) -> Contender:
    """Start the server of llama.cpp."""
    from llama import llama

    return llama(Path(args.path), args.types, args.threads, args.steps)


KINDS = {"bundle": bundle, "transformers": transformers_model, "llama": llama_server}


def _compiled(model: Any, inputs: dict[str, Any], stages: Stages, steps: int) -> Repeat:
    """Use `generate` with a static cache, whose decoding transformers compiles; a streamer takes times."""
    import transformers

    model.generation_config.eos_token_id = None  # so that it gives all tokens that are asked for
    compiling = transformers.CompileConfig()
    compiling._compile_all_devices = True  # by default it does not compile for a CPU
    times: list[float] = []

    class Clock(transformers.generation.BaseStreamer):
        def put(self, value: Any) -> None:  # the prompt, then each new token, in host memory
            times.append(time.perf_counter())
            if len(times) == 2:
                stages.stop()

        def end(self) -> None:
            pass

    def repeat() -> Repetition:
        times.clear()
        with stages:
            start = time.perf_counter()
            out = model.generate(
                **inputs,
                max_new_tokens=steps + 1,
                do_sample=False,
                cache_implementation="static",
                compile_config=compiling,
                output_logits=True,
                return_dict_in_generate=True,
                streamer=Clock(),
            )
        ms = {"first token": (times[1] - start) * 1e3, **stages.spent}
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return Repetition(out.logits[0][0], tokens, ms | {"decode": (times[-1] - times[1]) * 1e3 / steps})

    return repeat


class Stages:
    """Milliseconds spent in the modules of each stage while the block runs.

    Args:
        wait: Returns when the device has finished its work.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.spent: dict[str, float] = {}
        self._wait = wait
        self._starts: dict[str, float] = {}
        self._on = False

    def __enter__(self) -> Stages:
        self.spent.clear()
        self._on = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the measurement of the modules."""
        self._on = False

    def watch(self, stage: str, *modules: Any) -> None:
        """Count the time of these modules to a stage."""

        def begin(*_: object) -> None:
            if self._on:
                self._wait()
                self._starts[stage] = time.perf_counter()

        def end(*_: object) -> None:
            if self._on:
                self._wait()
                self.spent[stage] = self.spent.get(stage, 0.0) + elapsed(self._starts[stage])

        for module in modules:
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end)


def main() -> None:
    """Load the model, then repeat until stdin is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=16, help="tokens that are decoded after the first")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--types", help="of llama.cpp's vision file and text file, such as Q8_0+Q4_0")
    args = parser.parse_args()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # so that text that a library prints is no reply
        made = KINDS[args.kind](args)
        try:
            gc.collect()
            print(json.dumps({"memory": asdict(Memory.of(made.process))}), file=replies, flush=True)
            for line in sys.stdin:
                done = made.repeat()
                reply = {"ms": done.ms, "memory": asdict(Memory.of(made.process))}
                if line.strip() == "answer":
                    reply |= {"tokens": done.tokens, "logits": done.logits.tolist()}
                print(json.dumps(reply), file=replies, flush=True)
        finally:
            made.close()


if __name__ == "__main__":
    main()
