"""`visprune run`: one question about pictures, the answer as it comes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.commands.arguments import (
    BundleDir,
    Frames,
    Images,
    KeepTokens,
    LowMemory,
    Provider,
    Ratio,
    RepetitionPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    Videos,
)
from visprune.terminal import busy, note, print_json
from visprune.units import in_bytes

if TYPE_CHECKING:
    from visprune.manifest import Pruning
    from visprune.runtime import Generation, Pipeline

__all__ = ["open_pipeline", "run"]

_OVERLAY_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def run(  # noqa: PLR0913 - a command line's options
    bundle: BundleDir,
    *,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="The question.", show_default=False)
    ],
    system: System = None,
    image: Images = None,
    video: Videos = None,
    frames: Frames = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens generated.")] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    ratio: Ratio = None,
    keep_tokens: KeepTokens = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    low_memory: LowMemory = False,
    overlay: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the picture with dropped patches dimmed.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --overlay replace a file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Answer a question about pictures.

    Example: visprune-run llava-fopru --image cat.png --prompt "What is in the picture?"
    """
    from visprune.bundle import Bundle
    from visprune.errors import UsageError
    from visprune.runtime.generation import GenerationLimits
    from visprune.runtime.prompts import check_prompt
    from visprune.runtime.reading import check_texts
    from visprune.runtime.sampling import Sampling
    from visprune.runtime.vision.images import decode, decode_frames
    from visprune.runtime.vision.kept_tokens import keep_for
    from visprune.runtime.vision.sources import Video
    from visprune.staging import whole

    # Whatever can be refused without the model is refused before gigabytes are hashed and loaded.
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    limits = GenerationLimits(max_new_tokens, tuple(stop or ()))
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    check_prompt(prompt, manifest)
    check_texts(opened, system=system, stop=limits.stop)
    keep = keep_for(manifest, ratio=ratio, keep_tokens=keep_tokens)
    if not image and not video and not (ratio is None and keep_tokens is None):
        raise UsageError(
            "There is no picture whose visual tokens could be dropped.",
            "Give one with --image, or leave --ratio and --keep-tokens out.",
        )
    if force and not overlay:
        raise UsageError(
            "--force replaces an overlay, and none is asked for.", "Add --overlay, or leave --force out."
        )
    pictures = [decode(one) for one in image or []]
    videos = [Video(decode_frames(one, frames)) for one in video or []]
    targets = _overlay_targets(overlay, len(pictures), manifest.pruning, force=force) if overlay else []

    with open_pipeline(bundle, provider, threads, low_memory=low_memory) as pipeline:
        stream = pipeline.stream(
            [*pictures, *videos],
            prompt,
            max_new_tokens=limits.max_new_tokens,
            sampling=sampling,
            stop=limits.stop,
            system=system,
            ratio=ratio,
            keep_tokens=keep_tokens,
        )
        if not as_json:
            for piece in stream:
                print(piece, end="", flush=True)
            print(flush=True)
        answer = stream.result
        for target, picture, kept in zip(targets, pictures, answer.keep_indices, strict=False):
            with whole(target) as temporary:
                pipeline.overlay(picture, kept, images=len(pictures)).save(temporary)
    if as_json:
        print_json(asdict(answer), lines=True)
        return
    if pictures or videos:
        note(keep.describe(manifest, len(pictures)))
    if manifest.tiling is not None and answer.visual_tokens:
        left = answer.tokens_kept / answer.visual_tokens
        note(f"kept {answer.tokens_kept} of {answer.visual_tokens} visual tokens in all ({left:.1%})")
    note(_timing_line(answer))


def open_pipeline(bundle: Path, provider: str, threads: int | None, *, low_memory: bool) -> Pipeline:
    """Load a bundle with a spinner; shared with `chat`."""
    from visprune.runtime import load

    with busy(f"Loading {bundle}") as update:
        return load(
            bundle,
            provider=provider,
            threads=threads,
            low_memory=low_memory,
            on_file=lambda name, count: update(f"Checking {name} ({in_bytes(count)}), once"),
        )


def _timing_line(answer: Generation) -> str:
    times = dict(answer.timings_ms)
    total, decode, per_token = (times.pop(name) for name in ("total", "decode", "decode_per_token"))
    stages = ", ".join(f"{name} {ms:.0f}" for name, ms in times.items())
    speed = f", decode {decode:.0f} ({per_token:.1f} a token)" if decode else ""
    return f"{answer.tokens_in} tokens in, {len(answer.token_ids)} out, {total:.0f} ms: {stages}{speed}"


def _overlay_targets(overlay: Path, images: int, pruning: Pruning, *, force: bool) -> list[Path]:
    """Where the overlays go: the name given, numbered where there are several images."""
    from visprune.errors import UnsupportedError, UsageError

    if not images:
        raise UsageError("An overlay needs a picture.", "Give one with --image, or leave --overlay out.")
    if pruning.grid is None:
        raise UnsupportedError(
            "The visual tokens of this model are not a grid of patches.", "Leave --overlay out."
        )
    if overlay.suffix.lower() not in _OVERLAY_SUFFIXES:
        raise UsageError(
            f"{overlay} does not end in the name of a picture format.", f"End it in {_OVERLAY_SUFFIXES[0]}."
        )
    if not overlay.parent.is_dir():
        raise UsageError(f"There is no directory {overlay.parent}.", "Create it first.")
    if images == 1:
        targets = [overlay]
    else:
        targets = [overlay.with_stem(f"{overlay.stem}-{number}") for number in range(1, images + 1)]
    for target in targets:
        if target.is_dir():
            raise UsageError(f"{target} is a directory.", "Name a file.")
        if target.exists() and not force:
            raise UsageError(f"{target} exists.", "Give another name, or --force to replace it.")
    return targets
