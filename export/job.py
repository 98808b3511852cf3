"""The work of an export: all decisions are made, what is left is to trace, write, hash and compare."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visprune import __version__
from visprune.bundle import Bundle
from visprune.errors import ExportError, VispruneError
from visprune.export.beside import Beside
from visprune.export.checkpoint import Checkpoint
from visprune.export.program import program
from visprune.export.targets import Target
from visprune.manifest import MANIFEST, SCHEMA_VERSION, FileRecord, Manifest, Parity, Pruning, Source
from visprune.pruning.base import VisionPruner
from visprune.records import sha256

if TYPE_CHECKING:
    from visprune.export.inside import Inside
    from visprune.export.loading import Processor
    from visprune.export.parts import Features
    from visprune.manifest import Graph

__all__ = ["Job", "Progress", "untraceable"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""

_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "safetensors")


@dataclass(frozen=True, slots=True)
class Job:
    """All decisions made; what is left is to write."""

    checkpoint: Checkpoint
    config: Any
    features: Features
    pruner: VisionPruner
    pruning: Pruning
    inside: Inside
    target: Target
    dtype: str
    progress: Progress

    def processor(self) -> Processor:
        """Tokenizer, chat template and image processor, checked to fit the model."""
        from visprune.export import loading

        processor = loading.load_processor(self.checkpoint, self.config)
        _check_image_processor(processor.image_processor, self.features)
        return processor

    def write(self, folder: Path, *, verify: bool) -> None:
        """Write a complete bundle into an empty folder."""
        from visprune.export import loading

        self.progress("loading the checkpoint", 0, 1)
        processor = self.processor()
        for name, text in loading.processor_files(processor).items():
            (folder / name).write_text(text, encoding="utf-8")
        if self.inside.recipe is not None:
            (folder / "recipe.json").write_text(self.inside.recipe.to_json(), encoding="utf-8")
        model = loading.load_model(self.checkpoint)
        self.progress("loading the checkpoint", 1, 1)

        # Tracing keeps one core busy; hashing and writing go on beside it, one after another.
        with Beside() as beside:
            weights_sha256 = beside.submit(self.checkpoint.weights_sha256, beside.heed)
            graphs = self._write_graphs(model, folder, beside)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            hashes = [beside.submit(sha256, path, beside.heed) for path in files]
            manifest = Manifest(
                schema_version=SCHEMA_VERSION,
                source=self._source(model, weights_sha256.result()),
                target=self.target.name,
                flavour=self.target.flavour,
                dtype=self.dtype,
                opset=self.target.opset,
                graphs=graphs,
                stages=program(graphs, self.inside.pruning),
                pruning=self.pruning,
                layer_pruning=self.inside.pruning,
                decoder=loading.decoder_facts(model, self.dtype),
                shapes=loading.shapes(model, self.features),
                text=processor.text,
                image_processor="preprocessor_config.json",
                parity=Parity(verified=False),
                files={
                    path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, "") for path in files
                },
            )
            # The self-check maps the weights anew, when it needs them, and for as long. Modules refer to
            # each other in circles, so nothing is freed before it is collected.
            del model
            gc.collect()
            if verify:
                manifest = replace(manifest, parity=self._verify(Bundle(folder, manifest)))
            records = {
                name: replace(record, sha256=digest.result())
                for (name, record), digest in zip(manifest.files.items(), hashes, strict=True)
            }
        (folder / MANIFEST).write_text(replace(manifest, files=records).to_json(), encoding="utf-8")

    def _verify(self, bundle: Bundle) -> Parity:
        from visprune.export.verify import ROWS, ROWS_PER_POINT, verify

        count, total = 0, ROWS + len(self.pruner.signals)
        if self.inside.pruning is not None:
            total += 1 + ROWS_PER_POINT * len(self.inside.pruning.layers)

        def report(name: str) -> None:
            nonlocal count
            count += 1
            self.progress("comparing with PyTorch", count, total)

        self.progress("comparing with PyTorch", 0, 1)
        return verify(bundle, self.checkpoint, self.features, (self.pruner, self.inside.cuts), report)

    def _write_graphs(self, model: Any, folder: Path, beside: Beside) -> dict[str, Graph]:
        """Trace every graph, and have it written while the next one is traced."""
        import torch

        from visprune.export import loading, models
        from visprune.export.plan import plan
        from visprune.export.trace import trace
        from visprune.export.write import write_graph

        family = models.family(self.checkpoint.model_type)
        dtype = getattr(torch, self.dtype)
        bare, fake = loading.skeleton(self.config, self.checkpoint.model_type, self.target, dtype)
        steps = plan(self.config, self.features, self.pruner, self.inside.cuts, dtype)
        writing: dict[str, Future[Graph]] = {}
        for index, step in enumerate(reversed(steps)):  # the decoder is the largest, and the last
            self.progress("tracing the graphs", index, len(steps))
            with fake:
                skeleton = step.build(family.parts(bare)).eval()
            weights = step.build(family.parts(model)).eval()
            try:
                graph = trace(skeleton, weights, step.inputs, step.outputs, self.target, fake)
            except VispruneError:
                raise
            except Exception as error:  # what a tracer says of a model it cannot follow has no one type
                raise untraceable(step.name, error) from error
            total = sum(t.nbytes for t in (*weights.parameters(), *weights.buffers()))
            advance = _Advance(self.progress, f"writing {step.name}", total, beside.heed)
            writing[step.name] = beside.submit(write_graph, graph, weights, folder, step.name, advance)
        self.progress("tracing the graphs", len(steps), len(steps))
        return {step.name: writing[step.name].result() for step in steps}

    def _source(self, model: Any, weights_sha256: str) -> Source:
        versions = {"visprune": __version__, "python": platform.python_version()}
        versions |= {name: _version(name) for name in _PACKAGES if _version(name)}
        return Source(
            model=self.checkpoint.name,
            model_type=self.checkpoint.model_type,
            vision_type=self.config.vision_config.model_type,
            text_type=self.config.text_config.model_type,
            parameters=sum(p.numel() for p in model.parameters()),
            weights_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            weights_sha256=weights_sha256,
            versions=versions,
            revision=self.checkpoint.revision,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


class _Advance:
    """Adds up what was written, for a progress display."""

    def __init__(self, progress: Progress, what: str, total: int, heed: Callable[[], None]) -> None:
        self.progress, self.what, self.total, self.done = progress, what, total, 0
        self.heed = heed

    def __call__(self, count: int) -> None:
        self.heed()
        self.done = min(self.done + count, self.total)
        self.progress(self.what, self.done, self.total)


def untraceable(name: str, error: Exception) -> ExportError:
    """What to say where PyTorch cannot follow a model."""
    return ExportError(
        f"The graph {name} of this model cannot be traced: {_cause(error)}.",
        "Its architecture is probably not supported; use a model from the documentation's list.",
    )


def _cause(error: BaseException) -> str:
    """The first line of the innermost reason, because the outer ones say where and not why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _check_image_processor(config: dict[str, Any], features: Features) -> None:
    """Refuse here what the runtime would refuse, or what the vision encoder would not take."""
    import numpy as np
    from PIL import Image

    from visprune.runtime.preprocess import ImageProcessor

    size = features.image_size
    pixels = ImageProcessor.from_config(config)(Image.fromarray(np.zeros((size, size + 2, 3), np.uint8)))
    if pixels.shape[1:] != (features.channels, size, size):
        raise ExportError(
            f"The image processor makes pictures of {pixels.shape[3]} x {pixels.shape[2]} pixels, and the "
            f"vision tower takes {size} x {size}.",
            "Correct processor_config.json or preprocessor_config.json.",
        )
