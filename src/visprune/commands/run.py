"""`visprune run`: answer one question about images, piece by piece."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visprune.commands.arguments import BundleDir, Frames, Videos
from visprune.commands.conversation_options import ConversationOptions, open_pipeline
from visprune.commands.option_fields import with_options
from visprune.terminal import note, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from visprune.manifest import Manifest, Pruning
    from visprune.runtime import Generation, Message
    from visprune.runtime.options import AnswerOptions
    from visprune.runtime.structured import JsonSchema
    from visprune.runtime.vision.sources import VisualInput

__all__ = ["run"]

_MAX_SCHEMA = 1_000_000  # bytes that are read of a schema's file; one that is longer is cut, and no JSON
_OVERLAY_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@with_options(ConversationOptions)
def run(  # noqa: PLR0913 - a command line's options
    bundle: BundleDir,
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The question.", show_default=False)
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A whole conversation instead: a JSON list of messages, as OpenAI's API takes them.",
            show_default=False,
        ),
    ] = None,
    options: ConversationOptions,
    video: Videos = None,
    frames: Frames = 8,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 128,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Answer in JSON that fits the JSON Schema in this file.", show_default=False
        ),
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the image with dropped patches dimmed.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --overlay replace a file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Answer a question about images.

    Example: visprune-run llava-fopru --image cat.png --prompt "What is in the image?"
    """
    from PIL import Image

    from visprune.errors import UsageError
    from visprune.runtime.vision.images import decode_frames
    from visprune.runtime.vision.sources import Video
    from visprune.staging import whole

    if (prompt is None) == (messages is None):
        raise UsageError(
            "There is no question." if prompt is None else "Both --prompt and --messages were given.",
            "Give --prompt TEXT, or a conversation with --messages FILE.",
        )
    if messages is not None and (options.image or video or options.system is not None):
        raise UsageError(
            "--messages has the pictures and the system prompt of the conversation.",
            "Leave --image, --video and --system out.",
        )
    checked = options.check(bundle, max_new_tokens, prompt)
    manifest = checked.bundle.manifest
    videos = [Video(decode_frames(one, frames)) for one in video or []]
    told = _conversation(messages, options.system, prompt or "", [*checked.pictures, *videos], manifest)
    pictures = [part for message in told for part in message.visual if isinstance(part, Image.Image)]
    if not pictures and not video and not (options.ratio is None and options.keep_tokens is None):
        raise UsageError(
            "There is no picture whose visual tokens could be dropped.",
            "Give one with --image, or leave --ratio and --keep-tokens out.",
        )
    if force and not overlay:
        raise UsageError(
            "--force replaces an overlay, and none is asked for.", "Add --overlay, or leave --force out."
        )
    targets = _overlay_targets(overlay, len(pictures), manifest.pruning, force=force) if overlay else []
    schema = _read_schema(json_schema) if json_schema else None

    with open_pipeline(checked.bundle, options, wait=False) as pipeline:
        answering: AnswerOptions = {**checked.answer, "schema": schema}
        turn = pipeline.prepare(told, ratio=options.ratio, keep_tokens=options.keep_tokens, **answering)
        stream = pipeline.answer(turn)
        if not as_json:
            for piece in stream:
                print(piece, end="", flush=True)
            print(flush=True)
        answer = stream.result
        shown = zip(targets, pictures, answer.keep_indices, answer.merged_indices, strict=False)
        for target, picture, kept, merged in shown:
            with whole(target) as temporary:
                drawn = pipeline.overlay(
                    picture,
                    kept,
                    images=len(pictures),
                    merged_indices=merged,
                    keep_tokens=checked.keep.tokens,
                )
                drawn.save(temporary)
    if as_json:
        print_json(asdict(answer), lines=True)
        return
    if pictures:
        note(checked.keep.describe(manifest, len(pictures)))
    if manifest.tiling is not None and answer.visual_tokens:
        left = answer.tokens_kept / answer.visual_tokens
        note(f"kept {answer.tokens_kept} of {answer.visual_tokens} visual tokens in all ({left:.1%})")
    note(_timing_line(answer))


def _conversation(
    file: Path | None, system: str | None, prompt: str, shown: Sequence[VisualInput], manifest: Manifest
) -> list[Message]:
    """Return the messages of a file, or those of a question."""
    from visprune.runtime import Message
    from visprune.runtime.message_files import read_messages
    from visprune.runtime.prompts import check_message

    if file is None:
        asked = Message("user", [*shown, prompt])
        return [asked] if system is None else [Message("system", system), asked]
    told = read_messages(file)
    for message in told:
        check_message(message, manifest)
    return told


def _timing_line(answer: Generation) -> str:
    """Return the number of tokens and the milliseconds of each step in one line."""
    times = dict(answer.timings_ms)
    total, decode, per_token = (times.pop(name) for name in ("total", "decode", "decode_per_token"))
    stages = ", ".join(f"{name} {ms:.0f}" for name, ms in times.items())
    speed = f", decode {decode:.0f} ({per_token:.1f} a token)" if decode else ""
    return f"{answer.tokens_in} tokens in, {len(answer.token_ids)} out, {total:.0f} ms: {stages}{speed}"


def _read_schema(path: Path) -> JsonSchema:
    """Return the schema in a file.

    Raises:
        UsageError: The file cannot be read, is no JSON, or is refused by `check_schema`.
        UnsupportedError: The schema cannot be followed.
        MissingExtraError: llguidance is not installed.
    """
    import json

    from visprune.errors import UsageError
    from visprune.runtime.structured import check_schema

    try:
        with path.open("rb") as file:
            schema: JsonSchema = json.loads(file.read(_MAX_SCHEMA))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"The JSON schema {path} cannot be read: {error}.", "Name a file that holds a JSON Schema."
        ) from None
    check_schema(schema)
    return schema


def _overlay_targets(overlay: Path, images: int, pruning: Pruning, *, force: bool) -> list[Path]:
    """Return the file of each overlay: the name given, or numbered names for several images.

    Raises:
        UsageError: There is no image, or a file cannot be written or exists.
        UnsupportedError: The visual tokens are not a grid of patches.
    """
    from visprune.errors import UnsupportedError, UsageError
    from visprune.outputs import check_file

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
    if images == 1:
        targets = [overlay]
    else:
        targets = [overlay.with_stem(f"{overlay.stem}-{number}") for number in range(1, images + 1)]
    for target in targets:
        check_file(target, force=force)
    return targets
