"""A process that holds one row's model and repeats its work on demand.

    python -m visprune.bench.measure.worker

Requests come as lines of JSON on stdin, and each has one line as its answer on stdout:

    {"contender": ..., "work": ...}   loads; answered by `Loaded`
    {"do": "repeat"}                  answered by `Done`
    {"do": "pictures"}                the overlays of the last repetition, JPEG in base64

What goes wrong is answered with `{"error": ...}`. In between the process waits, and costs nothing. It ends
with its parent, whose end it sees at stdin.
"""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import signal
import threading
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from visprune.bench.measure.protocol import Contender, Done, Loaded, Repeatable, elapsed, peak_memory
from visprune.bench.report.report import Repetition, Workload
from visprune.errors import UnsupportedError, VispruneError
from visprune.records import from_json
from visprune.units import ITEM_SIZE

if TYPE_CHECKING:
    from visprune.manifest import Manifest
    from visprune.runtime.generation import Generation
    from visprune.runtime.pipeline import Pipeline

__all__ = ["BundleModel", "main"]

_PICTURE = 320  # pixels of the longer side of an overlay in a report


class BundleModel:
    """A bundle in the runtime; each repetition is a new conversation.

    Args:
        contender: The bundle, and what it keeps.
        work: What to repeat.
    """

    def __init__(self, contender: Contender, work: Workload) -> None:
        from visprune.runtime.pipeline import load, threads_for
        from visprune.runtime.vision.kept_tokens import keep_for

        start = time.perf_counter()
        threads = threads_for(work.provider, work.threads)
        self._pipeline: Pipeline = load(contender.path, provider=work.provider, threads=threads)
        self.load = elapsed(start)
        manifest = self._pipeline.manifest
        self._keep = keep_for(manifest, ratio=contender.ratio, keep_tokens=contender.keep_tokens)
        # Every row is to generate equally many tokens, so none of them ends an answer.
        endless = replace(manifest, decoder=replace(manifest.decoder, eos_token_ids=()))
        self._model = replace(self._pipeline.loaded, manifest=endless)
        self._work = work
        self._entering = self._places()
        self._last: Generation | None = None

    def repeat(self) -> Done:
        """One prompt, and its answer."""
        from visprune.runtime.conversation import Chat

        work, manifest = self._work, self._pipeline.manifest
        answer = Chat(self._model, self._keep, work.system).generate(
            work.prompt, work.images, max_new_tokens=work.max_new_tokens
        )
        self._last = answer
        layers = answer.layer_tokens or (self._entering,) * manifest.decoder.num_layers
        text = answer.tokens_in - self._entering
        return Done(
            _repetition(answer.timings_ms),
            answer.visual_tokens,
            layers,
            text,
            len(answer.token_ids),
            _cache_bytes(manifest, sum(layers) + text * len(layers)),
            peak_memory(),
        )

    def _places(self) -> int:
        """Places that the images take in the prompt."""
        from visprune.runtime.vision.arrangement import arrange
        from visprune.runtime.vision.images import decode

        manifest, images = self._pipeline.manifest, self._work.images
        lengths = []
        for image in images:
            arrangement = None
            if manifest.tiling is not None:
                shown = decode(image)
                tiled = self._model.pictures.tiles(len(images))
                arrangement = arrange((shown.height, shown.width), manifest.tiling, tiled=tiled)
            lengths.append(self._keep.sequence_length(manifest.pruning, arrangement))
        return sum(lengths)

    def pictures(self) -> list[str]:
        """The overlay of each image in the last repetition."""
        images = self._work.images
        kept = self._last.keep_indices if self._last else ()
        found = []
        for image, indices in zip(images, kept, strict=True):
            try:
                drawn = self._pipeline.overlay(image, indices, images=len(images))
            except UnsupportedError:
                return []
            drawn.thumbnail((_PICTURE, _PICTURE))
            file = io.BytesIO()
            drawn.save(file, "JPEG", quality=85)
            found.append(base64.b64encode(file.getvalue()).decode("ascii"))
        return found


def _repetition(timings: dict[str, float]) -> Repetition:
    """The figures of a generation, as they stand in a report."""
    stages = dict(timings)
    total, decode, per_token = (stages.pop(name) for name in ("total", "decode", "decode_per_token"))
    first = total - decode
    return Repetition(first, {**stages, "other": max(0.0, first - sum(stages.values()))}, per_token)


def _cache_bytes(manifest: Manifest, tokens: int) -> int:
    """Of keys and values, for so many tokens over all layers."""
    decoder = manifest.decoder
    return 2 * decoder.num_kv_heads * decoder.head_dim * ITEM_SIZE[decoder.cache_dtype] * tokens


def _open(request: dict[str, Any]) -> tuple[Repeatable, float]:
    contender = from_json(Contender, request["contender"], "contender")
    work = from_json(Workload, request["work"], "work")
    if contender.dtype is None:
        held = BundleModel(contender, work)
        return held, held.load
    from visprune.bench.measure.in_pytorch import CheckpointModel  # with PyTorch

    checkpoint = CheckpointModel(contender, work)
    return checkpoint, checkpoint.load


def main() -> None:
    """Answer requests until stdin ends, which ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process itself
    requests: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # what a library prints is no reply
        model: Repeatable | None = None
        while True:
            request = json.loads(requests.get())
            reply: Any
            try:
                if model is None:
                    model, load = _open(request)
                    reply = asdict(Loaded(load))
                elif request["do"] == "repeat":
                    reply = asdict(model.repeat())
                else:
                    reply = model.pictures()
            except VispruneError as error:
                reply = {"error": {"kind": type(error).__name__, "what": error.what, "hint": error.hint}}
            except MemoryError:
                reply = {"error": _NO_MEMORY}
            print(json.dumps(reply), file=replies, flush=True)


_NO_MEMORY = {
    "kind": "UnsupportedError",
    "what": "There is not enough memory.",
    "hint": "Compare fewer at once: each is a process with its own weights.",
}


def _read(requests: queue.Queue[bytes]) -> None:
    with os.fdopen(0, "rb", closefd=False) as lines:
        for line in lines:
            requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
