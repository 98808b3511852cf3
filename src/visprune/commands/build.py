"""`visprune build`: build TensorRT engines of a bundle's graphs, into a new bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visprune.cache_names import PAST
from visprune.commands.arguments import BundleDir
from visprune.errors import UsageError
from visprune.targets import TARGETS
from visprune.terminal import bars, print_json
from visprune.units import in_bytes

if TYPE_CHECKING:
    from visprune.bundle import Bundle
    from visprune.engines import BuildOptions
    from visprune.engines.build_job import BuildPlan
    from visprune.manifest import EngineProfile

__all__ = ["build"]

_TARGETS = ", ".join(name for name, known in TARGETS.items() if known.engines)


def build(  # noqa: PLR0913 - a command line's options
    bundle: BundleDir,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Directory of the new bundle.")
    ] = None,
    target: Annotated[
        str, typer.Option("--target", "-t", metavar="NAME", help=f"Target of the engines: {_TARGETS}.")
    ] = "rtx",
    sm: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="For rtx, kinds of GPU by SM: 75, 80, 86, 89, 120 or 121; several with commas.",
            show_default="86",
        ),
    ] = None,
    max_images: Annotated[int, typer.Option(metavar="N", help="Most new images in one prompt.")] = 1,
    max_prompt: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most new tokens in one prompt.", show_default="whole images and 512"),
    ] = None,
    max_cache: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most tokens in a conversation.", show_default="a prompt and 512"),
    ] = None,
    workspace: Annotated[
        float | None,
        typer.Option(
            metavar="GB", help="GPU memory that a layer may use while it runs.", show_default="2.15"
        ),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Memory of this machine that a build may use.", show_default="all"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show profiles, sizes and problems; build nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Build TensorRT engines of every graph: for rtx on any machine, else for the GPU of this one.

    Example: visprune-build llava-fopru-rtx --target rtx --sm 86,89 -o llava-fopru-engines
    """
    from visprune.bundle import Bundle
    from visprune.engines import BuildOptions, Caps, Limits
    from visprune.engines.build_job import build_bundle, plan
    from visprune.engines.build_options import WORKSPACE
    from visprune.manifest import MANIFEST
    from visprune.staging import check_destination

    source = Bundle.open(bundle)
    options = BuildOptions(
        target,
        _sms(sm),
        Limits(max_images, max_prompt, max_cache),
        Caps(_gigabytes("--workspace", workspace) or WORKSPACE, _gigabytes("--max-memory", max_memory)),
        force,
    )
    planned = plan(source, options)
    if dry_run:
        if output is not None:
            check_destination(output, force=force, marker=MANIFEST)
        _show(planned, options, as_json=as_json)
        raise typer.Exit(2 if planned.problems else 0)
    if output is None:
        raise UsageError("There is no output directory.", "Give one with -o, or --dry-run.")
    with bars() as progress:
        made = build_bundle(source, output, options, progress=progress)
    if as_json:
        sizes = {engine.file: made.manifest.files[engine.file].size for engine in made.manifest.engines}
        engines = [asdict(engine) | {"bytes": sizes[engine.file]} for engine in made.manifest.engines]
        print_json({"bundle": str(made.path), "limits": asdict(planned.limits), "engines": engines})
    else:
        _print(made, planned)


def _sms(text: str | None) -> tuple[int, ...] | None:
    """Parse the value of --sm."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--sm is {text!r}.", "Give numbers with commas between, such as 86,89.") from None


def _gigabytes(option: str, count: float | None) -> int | None:
    """Convert the gigabytes of an option to bytes."""
    if count is not None and not 0 < count < 1e6:
        raise UsageError(f"{option} is {count:g}.", "Give gigabytes, such as 4.")
    return None if count is None else max(1, round(count * 1e9))


def _show(planned: BuildPlan, options: BuildOptions, *, as_json: bool) -> None:
    """Print what would be built, and the problems."""
    if as_json:
        print_json(
            {
                "target": planned.target,
                "sm": planned.sms,
                "gpu": asdict(planned.gpu) if planned.gpu else None,
                "limits": asdict(planned.limits),
                "profiles": {name: [asdict(p) for p in found] for name, found in planned.profiles.items()},
                "cache_capacity": planned.capacities,
                "graph_bytes": planned.graph_bytes,
                "cache_bytes": planned.cache_bytes,
                "workspace_bytes": options.caps.workspace,
                "problems": [{"what": problem.what, "hint": problem.hint} for problem in planned.problems],
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("graph", "size", "profile", "least > usual > most", box=None, pad_edge=False)
    for name, found in planned.profiles.items():
        weights = in_bytes(planned.graph_bytes[name])
        for profile in found:
            table.add_row(name, weights, profile.name, "\n".join(_ranges(profile)))
            name = weights = ""  # noqa: PLW2901 - printed once for a graph
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if planned.target in TARGETS:
        sms = ", ".join(f"SM{sm}" for sm in planned.sms) or "none found"
        console.print(f"{planned.target}: {TARGETS[planned.target].about}; GPU: {sms}\n")
    if planned.profiles:
        console.print(table)
        console.print(f"\n{_limits(planned)}")
        weights = in_bytes(sum(planned.graph_bytes.values()))
        console.print(
            f"GPU memory, not measured: {weights} of weights, the cache, and the workspace of layers"
        )
        console.print(f"(at most {in_bytes(options.caps.workspace)}, see --workspace)")
    for problem in planned.problems:
        console.print(f"problem: {problem.what}\n  {problem.hint}")
    if not planned.problems:
        console.print("nothing was built (--dry-run)")


def _ranges(profile: EngineProfile) -> list[str]:
    """Return a line for each input. The first cache stands for all: the others are only counted."""
    lines: list[str] = []
    caches = [name for name in profile.inputs if name.startswith(PAST)]
    for name, found in profile.inputs.items():
        if name in caches[1:]:
            continue
        lines.append(f"{name} {_shape(found.least)} > {_shape(found.usual)} > {_shape(found.most)}")
    return lines + ([f"... and {len(caches) - 1} more of the cache"] if len(caches) > 1 else [])


def _shape(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def _limits(planned: BuildPlan) -> str:
    """Describe the largest prompt and conversation, and the cache they need."""
    limits = planned.limits
    how = "written in place" if planned.capacities else "one copy read and one written"
    images = f"{limits.max_images} new image{'' if limits.max_images == 1 else 's'}"
    return (
        f"a prompt of at most {limits.max_prompt} new tokens with {images}, in a conversation of at most "
        f"{limits.max_cache} (cache {in_bytes(planned.cache_bytes)}, {how})"
    )


def _print(made: Bundle, planned: BuildPlan) -> None:
    """Print the sizes of the engines, with a row for each graph and a column for each SM."""
    from rich.console import Console
    from rich.table import Table

    engines, files = made.manifest.engines, made.manifest.files
    sms = list(dict.fromkeys(engine.sm for engine in engines))
    table = Table("engine", *(f"SM{sm}" for sm in sms), box=None, pad_edge=False)
    for name in dict.fromkeys(engine.graph for engine in engines):
        row: dict[int, Any] = {e.sm: in_bytes(files[e.file].size) for e in engines if e.graph == name}
        table.add_row(name, *(row[sm] for sm in sms))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    console.print(f"\n{_limits(planned)}")
    total = sum(record.size for record in files.values())
    console.print(f"built by {engines[0].flavour} {engines[0].version}, not run")
    console.print(f"wrote {made.path} ({in_bytes(total)})")
