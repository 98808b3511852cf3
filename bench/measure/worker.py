"""The worker: a process that holds the model of one row and repeats its work on request.

    python -m visprune.bench.measure.worker

Each request is a line of JSON on stdin, and has one line of JSON on stdout as its reply:

    {"contender": ..., "work": ...}   load the model; the reply is `Loaded`
    {"do": "repeat"}                  run the work once; the reply is `Done`
    {"do": "overlays"}                the reply is the overlays of the last repetition, JPEG in base64

The reply to a request that fails is `{"error": ...}`. Between requests the process waits and uses no
processor time. It ends with its parent, because stdin then ends.
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

_OVERLAY = 320  # pixels of the longer side of an overlay in a report
_PICTURE_CACHE = 1 << 40  # bytes; no images of one prompt take so many


class BundleModel:
    """A bundle in the runtime; each repetition is a new conversation.

    Args:
        contender: The bundle, and the tokens that it keeps.
        work: The work to repeat.
    """

    def __init__(self, contender: Contender, work: Workload) -> None:
        from visprune.runtime.loading import load, threads_for
        from visprune.runtime.vision.kept_tokens import keep_for

        start = time.perf_counter()
        threads = threads_for(work.provider, work.threads)
        self._pipeline: Pipeline = load(
            contender.path,
            provider=work.provider,
            threads=threads,
            picture_cache=_PICTURE_CACHE if work.cached else 0,
        )
        self.load = elapsed(start)
        manifest = self._pipeline.manifest
        self._keep = keep_for(manifest, ratio=contender.ratio, keep_tokens=contender.keep_tokens)
        # Every row must generate equally many tokens, so no token may end the answer.
        endless = replace(manifest, decoder=replace(manifest.decoder, eos_token_ids=()))
        self._model = replace(self._pipeline.loaded, manifest=endless)
        self._work = work
        self._entering = self._image_tokens()
        self._last: Generation | None = None

    def repeat(self) -> Done:
        """Run one prompt, and generate its answer."""
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

    def _image_tokens(self) -> int:
        """Return the number of positions that the images take in the prompt."""
        from visprune.runtime.vision.arrangement import arrange
        from visprune.runtime.vision.images import decode

        manifest, images = self._pipeline.manifest, self._work.images
        lengths = []
        pictures = self._model.pictures.for_tokens(manifest.pruning, self._keep.tokens)
        for image in images:
            arrangement = None
            if pictures.arranged is not None:
                shown = decode(image)
                tiled = pictures.tiles(len(images))
                arrangement = arrange((shown.height, shown.width), pictures.arranged, tiled=tiled)
            lengths.append(self._keep.sequence_length(manifest.pruning, arrangement))
        return sum(lengths)

    def overlays(self) -> list[str]:
        """Return the overlay of each image in the last repetition; empty if the model has no grid."""
        images = self._work.images
        if self._last is None:
            return []
        found = []
        for image, kept, merged in zip(
            images, self._last.keep_indices, self._last.merged_indices, strict=True
        ):
            try:
                drawn = self._pipeline.overlay(
                    image,
                    kept,
                    images=len(images),
                    merged_indices=merged,
                    keep_tokens=self._keep.tokens,
                )
            except UnsupportedError:
                return []
            drawn.thumbnail((_OVERLAY, _OVERLAY))
            file = io.BytesIO()
            drawn.save(file, "JPEG", quality=85)
            found.append(base64.b64encode(file.getvalue()).decode("ascii"))
        return found


def _repetition(timings: dict[str, float]) -> Repetition:
    """Return the times of a generation in the form of a report."""
    stages = dict(timings)
    total, decode, per_token = (stages.pop(name) for name in ("total", "decode", "decode_per_token"))
    first = total - decode
    return Repetition(first, {**stages, "other": max(0.0, first - sum(stages.values()))}, per_token)


def _cache_bytes(manifest: Manifest, tokens: int) -> int:
    """Return the size of keys and values for `tokens` tokens, summed over all layers."""
    decoder = manifest.decoder
    return 2 * decoder.num_kv_heads * decoder.head_dim * ITEM_SIZE[decoder.cache_dtype] * tokens


def _open(request: dict[str, Any]) -> tuple[Repeatable, float]:
    contender = from_json(Contender, request["contender"], "contender")
    work = from_json(Workload, request["work"], "work")
    if contender.dtype is None:
        held = BundleModel(contender, work)
        return held, held.load
    from visprune.bench.measure.in_pytorch import CheckpointModel  # imports PyTorch

    checkpoint = CheckpointModel(contender, work)
    return checkpoint, checkpoint.load


def main() -> None:
    """Answer requests until stdin ends, which ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends this process
    requests: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # a library that prints to stdout must not print into the replies
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
                    reply = model.overlays()
            except VispruneError as error:
                reply = {"error": {"kind": type(error).__name__, "what": error.what, "hint": error.hint}}
            except MemoryError:
                reply = {"error": _NO_MEMORY}
            print(json.dumps(reply), file=replies, flush=True)


_NO_MEMORY = {
    "kind": "UnsupportedError",
    "what": "There is not enough memory.",
    "hint": "Compare fewer bundles at once: each is a process with its own weights.",
}


def _read(requests: queue.Queue[bytes]) -> None:
    with os.fdopen(0, "rb", closefd=False) as lines:
        for line in lines:
            requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
