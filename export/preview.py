"""The dry run of an export: what it would write and need, found without reading weights or writing files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visprune.errors import ExportError, VispruneError
from visprune.export.checkpoint.resources import (
    Memory,
    available_memory,
    check_memory,
    check_resources,
    free_space,
    layers_memory,
    memory,
)
from visprune.export.export_job import ExportJob, untraceable
from visprune.export.export_options import ExportOptions
from visprune.export.exporter import prepare
from visprune.manifest import Scope
from visprune.pruning.base import LayerPruner, VisionPruner
from visprune.pruning.recipe import Recipe
from visprune.runtime.vision.kept_tokens import Keep

if TYPE_CHECKING:
    from visprune.export.checkpoint.processors import Processor

__all__ = ["GraphPreview", "Preview", "preview", "run"]


@dataclass(frozen=True, slots=True)
class GraphPreview:
    """One graph of a bundle and the size of its weights.

    Attributes:
        name: As in the manifest.
        file: Its path in the bundle.
        parameters: Numbers in its weights.
        bytes: Bytes of its weights, as they are written.
    """

    name: str
    file: str
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Preview:
    """The result of a dry run: what an export would write and need.

    Attributes:
        output: The directory it would make.
        model: As it was given.
        revision: The commit of a hub id.
        method: Name of the pruning method, the one before the LLM first where there are two.
        kept: How many visual tokens stay; None: a recipe must be fitted first.
        target: Platform.
        flavour: Form of its graphs, see `visprune.targets`.
        opset: ONNX operator set.
        dtype: Of the weights.
        graphs: In the order they run.
        bytes: Bytes of all weights, tokenizer and processor. The structure of the graphs adds some kilobytes
            for each layer.
        free_bytes: Bytes free on the disk that would hold them.
        memory: Memory needed at the peak of each step.
        available_memory: Bytes of free memory; None: the system does not say.
        self_check: How far the self-check goes; None: not at all, or memory does not suffice for it.
        self_check_bytes: Memory that the self-check needs.
        notes: Notes on the checkpoint, and on what cannot be known before the weights are read.
        obstacle: Why this machine could not do the export, and what to do; None: it could.
    """

    output: str
    model: str
    revision: str | None
    method: str
    kept: str | None
    target: str
    flavour: Literal["native", "primitive"]
    opset: int
    dtype: str
    graphs: tuple[GraphPreview, ...]
    bytes: int
    free_bytes: int
    memory: Memory
    available_memory: int | None
    self_check: Scope | None
    self_check_bytes: int
    notes: tuple[str, ...] = ()
    obstacle: tuple[str, str] | None = None


def preview(
    model: str | Path | None = None,
    *,
    method: str | VisionPruner | LayerPruner,
    output: str | Path | None = None,
    **options: Any,
) -> Preview:
    """Find what `visprune.export` with the same arguments would write and need.

    Nothing is written or downloaded, and no weight is read. Everything that an export refuses before it reads
    weights is refused here too, except a lack of memory or space, which becomes `Preview.obstacle`.

    Raises:
        VispruneError: As `visprune.export` does.
    """
    return run(model, output, ExportOptions(method=method, **options))


def run(model: str | Path | None, output: str | Path | None, options: ExportOptions) -> Preview:
    """Do what `preview` does, with its options as one value."""
    job, destination = prepare(model, output, options, dry=True)
    graphs = tuple(_graphs(job))
    scope, obstacle = _self_check(job, destination, options)
    needed = memory(job.checkpoint, job.dtype)
    return Preview(
        output=str(destination),
        model=job.checkpoint.name,
        revision=job.checkpoint.revision,
        method=_method(options),
        kept=_kept(job),
        target=job.target.name,
        flavour=job.target.flavour,
        opset=job.target.opset,
        dtype=job.dtype,
        graphs=graphs,
        bytes=sum(graph.bytes for graph in graphs) + _text_bytes(job.processor),
        free_bytes=free_space(destination),
        memory=needed,
        available_memory=available_memory(),
        self_check=scope,
        self_check_bytes=layers_memory(_before_decoder(graphs)) if scope == "layers" else needed.float32,
        notes=tuple(_notes(job)),
        obstacle=obstacle,
    )


def _method(options: ExportOptions) -> str:
    methods = options.methods()
    if methods.inside_asked is None:
        return methods.before_asked.name
    before = methods.before_asked.name
    return methods.inside_asked.name if before == "none" else f"{before}, then {methods.inside_asked.name}"


def _kept(job: ExportJob) -> str | None:
    """Return the sentence on kept tokens that every command prints."""
    if job.inside.is_open:
        return None
    return Keep(job.pruning.keep_tokens).sentence(job.pruning, job.inside.pruning, job.features.tiling)


def _notes(job: ExportJob) -> list[str]:
    notes = [*job.checkpoint.notes, *job.processor.notes, *job.weights.notes]
    if job.inside.is_open:
        notes.append(
            "The recipe is fitted when the weights are read: it decides how many tokens stay after which "
            "layers, and so how many segments the decoder is cut into. Their sizes add up to the one given."
        )
    notes += job.inside.notes
    if isinstance(job.inside.recipe, Recipe):
        notes.append("Whether the recipe was fitted on these weights shows when they are read.")
    return notes


def _self_check(
    job: ExportJob, destination: Path, options: ExportOptions
) -> tuple[Scope | None, tuple[str, str] | None]:
    """Return how far the self-check will go, and what this machine lacks for the export, if anything."""
    scope: Scope | None = None
    try:
        text_type = job.config.text_config.model_type
        scope = check_resources(job.checkpoint, job.dtype, destination, options.verify, text_type)
        if job.inside.is_open:
            check_memory(job.checkpoint, "fit", "fit a recipe where a GPU holds the model, with visprune fit")
    except ExportError as error:
        return scope, (error.what, error.hint)
    return scope, None


def _before_decoder(graphs: Sequence[GraphPreview]) -> int:
    """Return how many numbers the weights of the graphs before the decoder have."""
    return sum(graph.parameters for graph in graphs if not graph.name.startswith("decoder"))


def _text_bytes(processor: Processor) -> int:
    """Return the bytes of the files beside the graphs."""
    from visprune.export.checkpoint.processors import processor_files

    return sum(len(text.encode()) for text in processor_files(processor).values())


def _graphs(job: ExportJob) -> list[GraphPreview]:
    """Find the weights of every graph from the modules that would be traced."""
    import torch

    from visprune.export import models
    from visprune.export.graph import weightless
    from visprune.export.graph.graph_specs import graph_specs
    from visprune.export.graph.used_weights import used_tensors

    family = models.family(job.checkpoint.model_type)
    dtype = getattr(torch, job.dtype)
    bare, fake = weightless.skeleton(job.config, job.checkpoint.model_type, job.target, dtype)
    weightless.check_decoder(bare)
    found = []
    scope = job.pruning.budget.scope
    for step in graph_specs(job.config, job.features, job.pruner, job.inside.cuts, dtype, scope):
        try:
            with fake:
                used = used_tensors(step.build(family.parts(bare)).eval(), step.inputs)
        except VispruneError:
            raise
        except Exception as error:
            raise untraceable(step.name, error) from error
        is_open = job.inside.is_open and step.name.startswith("decoder")
        name = "decoder_segment_{k}" if is_open else step.name
        numbers = sum(t.numel() for t in used if isinstance(t, torch.nn.Parameter))
        found.append(GraphPreview(name, f"onnx/{name}.onnx", numbers, sum(t.nbytes for t in used)))
    return found
