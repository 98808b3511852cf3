"""The work of an export after every decision: trace, write, hash and compare the graphs."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visprune.background import BackgroundThread
from visprune.bundle import Bundle
from visprune.errors import ExportError, VispruneError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.graph.program import program
from visprune.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileRecord,
    Manifest,
    Parity,
    Pruning,
    Source,
    SourcePart,
)
from visprune.progress import Progress
from visprune.pruning.base import VisionPruner
from visprune.records import sha256
from visprune.targets import Target
from visprune.version import __version__

if TYPE_CHECKING:
    from visprune.export.checkpoint.processors import Processor
    from visprune.export.checkpoint.weights import Weights
    from visprune.export.inside_llm import Inside
    from visprune.export.models.parts import Features
    from visprune.manifest import Graph, Scope

__all__ = ["ExportJob", "untraceable"]

_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "safetensors")


@dataclass(frozen=True, slots=True)
class ExportJob:
    """An export with every decision made.

    Attributes:
        checkpoint: The model's files.
        config: Its configuration.
        features: Which of its tokens are visual.
        processor: Its tokenizer, chat template and image processor.
        model: Its modules, with parameters on the meta device.
        weights: Reads those parameters from the files.
        pruner: The method before the LLM.
        pruning: What that method does on this model.
        inside: What happens inside the LLM.
        target: The platform.
        dtype: Of the weights and activations.
        scope: How far the graphs are compared with PyTorch; None: not at all.
        progress: Called as the work goes on.
    """

    checkpoint: Checkpoint
    config: Any
    features: Features
    processor: Processor
    model: Any
    weights: Weights
    pruner: VisionPruner
    pruning: Pruning
    inside: Inside
    target: Target
    dtype: str
    scope: Scope | None
    progress: Progress

    def write(self, folder: Path) -> None:
        """Write a complete bundle into an empty folder, and compare its graphs with PyTorch."""
        from visprune.export.checkpoint import loading, processors

        processor = self.processor
        for name, text in processors.processor_files(processor).items():
            (folder / name).write_text(text, encoding="utf-8")
        if self.inside.recipe is not None:
            (folder / "recipe.json").write_text(self.inside.recipe.to_json(), encoding="utf-8")

        # Tracing keeps one core busy. Another thread hashes and writes meanwhile, one file at a time.
        with BackgroundThread() as background:
            weights_sha256 = background.submit(self.checkpoint.weights_sha256, background.check_cancelled)
            graphs = self._write_graphs(folder, background)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            hashes = [background.submit(sha256, path, background.check_cancelled) for path in files]
            manifest = Manifest(
                schema_version=SCHEMA_VERSION,
                source=self._source(weights_sha256.result()),
                target=self.target.name,
                flavour=self.target.flavour,
                dtype=self.dtype,
                opset=self.target.opset,
                graphs=graphs,
                stages=program(graphs, self.inside.pruning),
                pruning=self.pruning,
                layer_pruning=self.inside.pruning,
                decoder=loading.decoder_facts(
                    self.config.text_config, self.dtype, processor.tokenizer.eos_token_ids
                ),
                shapes=loading.shapes(self.model, self.features),
                tiling=self.features.tiling,
                text=processor.text,
                image_processor=processors.IMAGE_PROCESSOR,
                video_processor=processors.VIDEO_PROCESSOR if processor.video_processor else None,
                parity=Parity(verified=False),
                files={
                    path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, "") for path in files
                },
            )
            if self.scope is not None:
                manifest = replace(manifest, parity=self._verify(Bundle(folder, manifest), self.scope))
            records = {
                name: replace(record, sha256=digest.result())
                for (name, record), digest in zip(manifest.files.items(), hashes, strict=True)
            }
        (folder / MANIFEST).write_text(replace(manifest, files=records).to_json(), encoding="utf-8")

    def _verify(self, bundle: Bundle, scope: Scope) -> Parity:
        from visprune.export.verify.verify import count_comparisons, verify

        count, total = 0, count_comparisons(bundle.manifest, self.pruner, self.inside.cuts, scope)

        def report(name: str) -> None:
            nonlocal count
            count += 1
            self.progress("comparing with PyTorch", count, total)

        self.progress("comparing with PyTorch", 0, 1)
        methods = (self.pruner, self.inside.cuts)
        return verify(bundle, self.checkpoint, self.features, methods, scope, report)

    def _write_graphs(self, folder: Path, background: BackgroundThread) -> dict[str, Graph]:
        """Trace every graph; another thread writes it while the next one is traced."""
        import torch

        from visprune.export import models
        from visprune.export.graph import weightless
        from visprune.export.graph.graph_specs import graph_specs
        from visprune.export.graph.trace import trace
        from visprune.export.graph.write import write_graph

        family, weights = models.family(self.checkpoint.model_type), self.weights
        dtype = getattr(torch, self.dtype)
        bare, fake = weightless.skeleton(self.config, self.checkpoint.model_type, self.target, dtype)
        scope = self.pruning.budget.scope
        steps = graph_specs(self.config, self.features, self.pruner, self.inside.cuts, dtype, scope)
        writing: dict[str, Future[Graph]] = {}
        for index, step in enumerate(reversed(steps)):  # the decoder, which is last, takes longest to write
            self.progress("tracing the graphs", index, len(steps))
            with fake:
                skeleton = step.build(family.parts(bare)).eval()
            module = step.build(family.parts(self.model)).eval()
            try:
                graph = trace(skeleton, module, weights, step.inputs, step.outputs, self.target, fake)
            except VispruneError:
                raise
            except Exception as error:  # a tracer raises errors of many types
                raise untraceable(step.name, error) from error
            total = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            advance = _Advance(self.progress, f"writing {step.name}", total, background.check_cancelled)
            writing[step.name] = background.submit(
                write_graph, graph, module, weights, folder, step.name, advance
            )
        self.progress("tracing the graphs", len(steps), len(steps))
        return {step.name: writing[step.name].result() for step in steps}

    def _source(self, weights_sha256: str) -> Source:
        versions = {"visprune": __version__, "python": platform.python_version()}
        versions |= {name: _version(name) for name in _PACKAGES if _version(name)}
        return Source(
            model=self.checkpoint.name,
            model_type=self.checkpoint.model_type,
            vision_type=self.config.vision_config.model_type,
            text_type=self.config.text_config.model_type,
            parameters=sum(p.numel() for p in self.model.parameters()),
            weights_dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            weights_sha256=weights_sha256,
            versions=versions,
            revision=self.checkpoint.revision,
            parts=tuple(
                SourcePart(part.role, part.name, self.checkpoint.sha256_of(part.files), part.revision)
                for part in self.checkpoint.parts
            ),
            conversation=self.checkpoint.conversation,
            pickled_weights=any(file.suffix == ".bin" for file in self.checkpoint.files),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


class _Advance:
    """A progress callback that adds up the bytes written."""

    def __init__(
        self, progress: Progress, what: str, total: int, check_cancelled: Callable[[], None]
    ) -> None:
        self.progress, self.what, self.total, self.done = progress, what, total, 0
        self.check_cancelled = check_cancelled

    def __call__(self, count: int) -> None:
        self.check_cancelled()
        self.done = min(self.done + count, self.total)
        self.progress(self.what, self.done, self.total)


def untraceable(name: str, error: Exception) -> ExportError:
    """Return the error of a graph that PyTorch cannot trace."""
    hint = "Its architecture is probably not supported; use a model from the documentation's list."
    if name == "token_pruner":
        hint = "If the method is your own, see what `select` gets and returns in `visprune.pruning.base`."
    return ExportError(f"The graph {name} of this model cannot be traced: {_cause(error)}.", hint)


def _cause(error: BaseException) -> str:
    """Return the first line of the innermost error: the outer ones say where it happened, and not why."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = (str(error).strip().splitlines() or [""])[0]
    said = f"{type(error).__name__} {first}" if isinstance(error, KeyError) else first
    return (said or type(error).__name__).removesuffix(".")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
