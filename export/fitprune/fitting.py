"""A fit of a FitPrune recipe to a checkpoint and samples, in the order of its steps.

The options, the samples with their images, and the prompts as token ids are checked before the weights
are read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visprune.background import BackgroundThread
from visprune.errors import InputError, UsageError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.find import find
from visprune.export.checkpoint.resources import check_memory
from visprune.export.fitprune.fit_options import FitOptions
from visprune.optional import require
from visprune.progress import Progress, no_progress
from visprune.pruning.recipe import CONVENTION, SCHEMA_VERSION, Recipe, check_output, write_recipe
from visprune.pruning.recipe_points import fit_constrained
from visprune.pruning.recipe_search import Search
from visprune.pruning.recipe_task import Task
from visprune.runtime.samples import Sample, draw_samples, read_samples
from visprune.work import LayerWork

if TYPE_CHECKING:
    from visprune.export.checkpoint.prompt_maker import Prompt

_log = logging.getLogger(__name__)

__all__ = ["check_fit", "fit", "fit_checkpoint", "run"]


def fit(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Recipe:
    """Fit a FitPrune recipe: how many visual tokens each layer of a model may delete.

    Args:
        model: A directory, a hub id, or None for the bundled demo model.
        output: The file to write; None writes none.
        progress: Called as the work goes on.
        **options: The fields of `FitOptions`; `ratio` is required.

    Raises:
        UsageError: Options that make no sense, no calibration data, or an output that exists.
        InputError: A sample that cannot be used.
        CheckpointError: The checkpoint is missing or broken.
        UnsupportedError: The model cannot be pruned inside its LLM, or the ratio cannot be reached.
        MissingExtraError: torch or another package of the `export` extra is missing.
    """
    return run(model, output, FitOptions(**options), progress)


def run(
    model: str | Path | None, output: str | Path | None, options: FitOptions, progress: Progress | None = None
) -> Recipe:
    """Do what `fit` does, with its options as one value."""
    if output is not None:
        check_output(Path(output), force=options.force)
    checkpoint = find(model, options)
    ready = _ready(checkpoint, options)
    for note in ready.notes:
        _log.warning(note)
    recipe = _fit(checkpoint, options, ready, progress)
    if output is not None:
        write_recipe(recipe, output, force=options.force)
    return recipe


def fit_checkpoint(checkpoint: Checkpoint, options: FitOptions, progress: Progress | None = None) -> Recipe:
    """Fit a recipe for a checkpoint that was found already. Raises the errors of `fit`."""
    return _fit(checkpoint, options, _ready(checkpoint, options), progress)


def check_fit(checkpoint: Checkpoint, options: FitOptions) -> None:
    """Raise every error of `fit_checkpoint` that does not need the weights, except a lack of memory."""
    _ready(checkpoint, options)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A fit without the weights: prompts as the model takes them, the task, and notes for the user."""

    prompts: list[Prompt]
    task: Task
    notes: tuple[str, ...]


def _ready(checkpoint: Checkpoint, options: FitOptions) -> _Ready:
    """Do the part of a fit that needs no weights."""
    lines = draw_samples(read_samples(options.data).usable, options.samples, options.seed)
    for module in ("torch", "transformers", "safetensors"):
        require(module, extra="export")
    from visprune.export import models
    from visprune.export.checkpoint import loading

    _check_device(options.device)
    loading.silence_transformers()
    config = loading.load_config(checkpoint)
    models.check_cut(config.text_config.model_type)
    prompts, notes = _prompts(checkpoint, config, lines)
    task = Task(
        num_layers=config.text_config.num_hidden_layers,
        visual_tokens=len(prompts[0].visual),
        work=LayerWork(config.text_config.hidden_size, config.text_config.intermediate_size),
        ratio=options.ratio,
    )
    task.check_possible(range(task.num_layers))
    return _Ready(prompts, task, (*checkpoint.notes, *notes))


def _fit(checkpoint: Checkpoint, options: FitOptions, ready: _Ready, progress: Progress | None) -> Recipe:
    report = progress or no_progress
    prompts, task = ready.prompts, ready.task
    if options.device == "cpu":
        check_memory(checkpoint, "fit", "fit where a GPU holds the model, with --device cuda")
    from visprune.export import models
    from visprune.export.fitprune import attention_statistics as statistics
    from visprune.export.graph import weightless

    with BackgroundThread() as background:
        weights_sha256 = background.submit(checkpoint.weights_sha256, background.check_cancelled)
        report("loading the checkpoint", 0, 1)
        model = weightless.load_model(checkpoint).to(options.device).float()
        parts = models.family(checkpoint.model_type).parts(model)
        statistics.prepare(model, parts)
        report("loading the checkpoint", 1, 1)
        samples = []
        for index, prompt in enumerate(prompts):
            report("encoding the images", index, len(prompts))
            samples.append(statistics.sample(model, parts, prompt))
        report("encoding the images", len(prompts), len(prompts))
        search = Search(task, samples, partial(report, "measuring attention"))
        best, unconstrained = search.fit(step=partial(report, "searching a recipe")), None
        if options.max_prune_points is not None:
            unconstrained = best
            at_most = f"searching with at most {options.max_prune_points} prune points"
            best = fit_constrained(search, best, options.max_prune_points, partial(report, at_most))
        return Recipe(
            schema_version=SCHEMA_VERSION,
            method="fitprune",
            model=checkpoint.name,
            weights_sha256=weights_sha256.result(),
            num_layers=task.num_layers,
            hidden_size=task.work.hidden_size,
            intermediate_size=task.work.intermediate_size,
            visual_tokens=task.visual_tokens,
            convention=CONVENTION,
            ratio=task.ratio,
            samples=len(samples),
            seed=options.seed,
            max_prune_points=options.max_prune_points,
            unconstrained=unconstrained,
            **{item.name: getattr(best, item.name) for item in fields(best)},
        )


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # an unknown name, or a build without it
        raise UsageError(
            f"PyTorch cannot compute on {device!r} here.", "Use cpu, or cuda on a machine that has it."
        ) from None


def _prompts(
    checkpoint: Checkpoint, config: Any, lines: Sequence[Sample]
) -> tuple[list[Prompt], tuple[str, ...]]:
    """Turn samples into prompts with equal numbers of visual tokens; return them and the processor's notes.

    Raises:
        CheckpointError: Tokenizer, template or image processor are missing or do not fit the model.
        InputError: A sample cannot be used.
    """
    from visprune.export import models
    from visprune.export.checkpoint import loading, processors
    from visprune.export.checkpoint.pixels import check_pixels
    from visprune.export.checkpoint.prompt_maker import PromptMaker
    from visprune.runtime.vision.images import decode

    features = models.family(checkpoint.model_type).features(config)
    processor = processors.load_processor(checkpoint, config)
    check_pixels(processor, features)
    make = PromptMaker(processor, features, config.text_config.vocab_size)
    image_token = processor.text.image_token
    longest = loading.context_limit(config.text_config)
    prompts: list[Prompt] = []
    for line in lines:
        if image_token in line.prompt:
            raise InputError(
                f"{line.where}: the prompt contains {image_token}, which stands for the image.",
                "Leave it out; the chat template puts the image in its place.",
            )
        try:
            prompt = make([decode(line.image)], line.prompt)
        except InputError as error:
            raise InputError(f"{line.where}: {error.what}", error.hint) from None
        length = prompt.input_ids.shape[1]
        if int(prompt.visual[-1]) == length - 1:
            raise InputError(
                f"{line.where} has no text after the image, whose attention FitPrune needs.",
                "Give a chat template that puts the prompt after the image, with --chat-template.",
            )
        if length > longest:
            raise InputError(
                f"{line.where} has {length} tokens, {len(prompt.visual)} of them visual, and the model takes "
                f"{longest}.",
                "Shorten the prompt, or take a smaller image.",
            )
        if prompts and len(prompt.visual) != len(prompts[0].visual):
            raise InputError(
                f"{line.where} has {len(prompt.visual)} visual tokens, and {lines[0].where} has "
                f"{len(prompts[0].visual)}.",
                "Fit on images that make equally many.",
            )
        prompts.append(prompt)
    return prompts, processor.notes
