"""Command `visprune plan`: whether a model fits a device, and how fast it can be there."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visprune.commands.arguments import KeepTokens, Ratio
from visprune.commands.export import RecipeFile, Then
from visprune.terminal import print_json
from visprune.units import in_bytes

if TYPE_CHECKING:
    from visprune.estimate.choices import Choice
    from visprune.estimate.devices import PlannedDevice
    from visprune.estimate.plan import Plan, StagePlan
    from visprune.estimate.planned_model import PrunedModel

__all__ = ["plan"]

_BOUND = {"FLOPs": "compute", "bytes": "memory"}  # words of the table, by `StagePlan.binds`


def plan(  # noqa: PLR0913 - a command line's options
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A hub id, a checkpoint directory (its config.json is enough), or a bundle; left out, the "
            "bundled demo model.",
        ),
    ] = None,
    *,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            "-d",
            metavar="NAME",
            help="A board, such as orin-nx-16gb; or this, with --calibration.",
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            metavar="NAME",
            help="Pruning method, see `visprune methods`.",
            show_default="none",
        ),
    ] = None,
    ratio: Ratio = None,
    keep_tokens: KeepTokens = None,
    then: Then = None,
    recipe: RecipeFile = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            "-p",
            metavar="NAME",
            help="Precision of linear layers: fp32, fp16, fp8, int8, int8-dynamic, int4.",
            show_default="the bundle's own, or the device's most exact",
        ),
    ] = None,
    ttft: Annotated[
        float | None,
        typer.Option(
            metavar="MS", help="Wanted time to the first token: print which ratios and precisions reach it."
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Report of `visprune bench --json` on the device.")
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(metavar="N", help="Text tokens of the prompt, besides its image.")
    ] = 64,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the answer.")] = 128,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Size of the picture, for a model that tiles pictures.",
            show_default="the most tiles",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Estimate memory and latency of a model on a device, before anything is exported.

    Example: visprune-plan llava-hf/llava-1.5-7b-hf --device orin-nx-16gb --method fopru-row --ratio 0.25
    --precision int8
    """
    from visprune.estimate.choices import best, choices
    from visprune.estimate.plan import PlannedPrompt, make_plan

    planned_device = _device(device, calibration)
    pruned_model = _model(model, method, ratio, keep_tokens, then, recipe)
    prompt = PlannedPrompt(text_tokens, new_tokens, _size(image_size))
    if precision is None:
        own = pruned_model.precision
        precision = own if own in planned_device.precisions else planned_device.precisions[0]
    made = make_plan(pruned_model, planned_device, precision, prompt)
    table = None if ttft is None else choices(pruned_model, planned_device, prompt, ttft)
    chosen = None if table is None else best(table)
    if as_json:
        print_json(_data(made, ttft, table, chosen))
        return
    _print(made)
    if table is not None and ttft is not None:
        _print_choices(table, chosen, ttft)


def _device(name: str, calibration: Path | None) -> PlannedDevice:
    """Return the device that a plan is made for: a board, or the machine of a calibration."""
    from visprune.errors import UsageError
    from visprune.estimate.boards import board
    from visprune.estimate.devices import board_device, measured_device

    found = None if name == "this" else board(name)
    measured = None
    if calibration is not None:
        from visprune.bench.calibration_report import read_calibration

        measured = read_calibration(calibration)
    if found is not None:
        return board_device(found, measured)
    if measured is None:
        raise UsageError(
            "What this machine can do is known only from a measurement.",
            "Measure a bundle with visprune-bench --json FILE, and give --calibration FILE.",
        )
    return measured_device(measured)


def _model(
    model: str | None,
    method: str | None,
    ratio: float | None,
    keep_tokens: int | None,
    then: str | None,
    recipe: Path | None,
) -> PrunedModel:
    """Return the model with its pruning: a bundle, or a model with the pruning of an export."""
    from visprune.bundle import Bundle
    from visprune.errors import UsageError
    from visprune.estimate.find_model import find_model
    from visprune.estimate.planned_model import bundle_model, prune
    from visprune.export.export_options import ExportOptions
    from visprune.manifest import MANIFEST

    if model is not None and (Path(model) / MANIFEST).is_file():
        given = {"--method": method, "--then": then, "--recipe": recipe}
        clash = [option for option, value in given.items() if value is not None]
        if clash:
            raise UsageError(
                f"{model} is a bundle, and has its methods.",
                f"Leave {clash[0]} out, or give the model instead.",
            )
        bundle = Bundle.open(Path(model))
        name = bundle.path.resolve().name
        return bundle_model(bundle.manifest, name, ratio=ratio, keep_tokens=keep_tokens)
    options = ExportOptions(
        method=method or "none", ratio=ratio, keep_tokens=keep_tokens, then=then, recipe=recipe
    )
    options.methods()  # refuses a misspelt method before the model is looked for
    return prune(find_model(model), options)


def _size(text: str | None) -> tuple[int, int] | None:
    """Return the height and width of an image, written as "WIDTHxHEIGHT"."""
    from visprune.errors import UsageError

    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text)  # noqa: RUF001 - as people write it
    if found is None:
        raise UsageError(f"{text!r} is no size.", "Give width and height in pixels, such as 1024x768.")
    return int(found[2]), int(found[1])


def _data(
    made: Plan, ttft: float | None, table: tuple[Choice, ...] | None, chosen: Choice | None
) -> dict[str, Any]:
    """Return what `--json` prints."""
    data = {"estimate": True, **asdict(made), "fits": made.fits}
    data["memory"] |= {"weights": made.memory.weights, "total": made.memory.total}
    data |= {"first_token_ms": made.first_token_ms, "first_token_peak_ms": made.first_token_peak_ms}
    if table is not None:
        data["ttft"] = {
            "wanted_ms": ttft,
            "choices": [asdict(choice) for choice in table],
            "best": asdict(chosen) if chosen else None,
        }
    return data


def _print(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    tiles = f" from {made.tiles} tiles" if made.tiles > 1 else ""
    console.print(f"ESTIMATE, not a measurement: {made.model} on {made.title}, {made.precision}")
    console.print(f"{made.kept}; {made.prompt_tokens} tokens{tiles} in, {made.prompt.new_tokens} out\n")
    table = Table("memory", "", "", box=None, pad_edge=False)
    memory = made.memory
    for name, count, about in (
        ("weights", memory.weights, f"{made.parameters / 1e9:.3g} G parameters, {made.precision}"),
        ("cache", memory.cache, "keys and values, answer included"),
        ("activations", memory.activations, "of the largest stage"),
        ("workspace", memory.workspace, "attention of one layer"),
        ("total", memory.total, _verdict(made)),
    ):
        table.add_row(f"  {name}", in_bytes(count), about)
    console.print(table, soft_wrap=False)
    console.print()
    columns = ("ms", "at peaks", "expected", "bound by", "GFLOP", "GB")
    times = Table(*columns, box=None, pad_edge=False)
    for column in (1, 2, 4, 5):
        times.columns[column].justify = "right"
    for stage in made.stages[:-1]:
        times.add_row(
            f"  {stage.stage}", *_times(stage.peak_ms, stage.expected_ms), _BOUND[stage.binds], *_load(stage)
        )
    times.add_row("first token", *_times(made.first_token_peak_ms, made.first_token_ms))
    token = made.token
    spent = _times(token.peak_ms, token.expected_ms)
    times.add_row("each further token", *spent, _BOUND[token.binds], *_load(token))
    console.print(times, soft_wrap=False)
    console.print()
    for line in (*made.findings, *made.sources):
        console.print(f"- {line}")


def _verdict(made: Plan) -> str:
    if made.usable is None:
        return "how much the device has is not known"
    verdict = "fits" if made.fits else "DOES NOT FIT"
    return f"of {in_bytes(made.usable)} usable: {verdict}"


def _times(at_peak: float | None, expected: float) -> tuple[str, str]:
    return "-" if at_peak is None else _number(at_peak), _number(expected)


def _load(stage: StagePlan) -> tuple[str, str]:
    return _number(stage.work / 1e9), _number(stage.bytes / 1e9)


def _number(value: float) -> str:
    """Return a number with three digits, or with all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _print_choices(table: tuple[Choice, ...], chosen: Choice | None, ttft: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    columns = ("ratio", "precision", "tokens", "first token, ms", "a token, ms", "memory", "")
    shown = Table(*columns, box=None, pad_edge=False)
    for choice in table:
        ratio = "as it is" if choice.ratio is None else f"{choice.ratio:g}"
        mark = "does not fit" if choice.fits is False else "in time" if choice.reached else "too late"
        shown.add_row(
            ratio,
            choice.precision,
            str(choice.prompt_tokens),
            _number(choice.first_token_ms),
            _number(choice.token_ms),
            in_bytes(choice.bytes),
            f"{mark}, best" if choice == chosen else mark,
        )
    console.print(f"\nto have the first token in {ttft:g} ms (expected times):\n")
    console.print(shown, soft_wrap=False)
    if chosen is None:
        console.print("\nNone reaches it; pruning does not shorten the time of the vision tower.")
    else:
        console.print(
            "\nbest: the most tokens, then the most exact precision. Measure what either costs in accuracy."
        )
