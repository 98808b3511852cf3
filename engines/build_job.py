"""From a bundle to a bundle with engines: what is asked for is checked first, then built one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from visprune import machine
from visprune.bundle import Bundle
from visprune.cache_names import PAST
from visprune.engines import cache
from visprune.engines.build_process import build_in_child
from visprune.engines.builder import Caps, Flavour, Request
from visprune.engines.checks import kinds, problems
from visprune.errors import VispruneError
from visprune.machine import Gpu
from visprune.manifest import MANIFEST, SCHEMA_VERSION, Engine, EngineProfile, FileRecord, Graph, Manifest
from visprune.progress import Progress, no_progress
from visprune.records import sha256
from visprune.runtime.backends.profiles import Limits, capacities, profiles, resolve_limits
from visprune.staging import check_destination, existing_parent, scratch, staged, tidy
from visprune.targets import TARGETS, in_place, tensorrt
from visprune.units import ITEM_SIZE
from visprune.verified import verify

__all__ = ["Plan", "build", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build would do.

    Attributes:
        target: Its name.
        sms: The kinds of GPU it would build for; empty where the one that is here is not known.
        gpu: The one that is here.
        limits: With a number for each.
        profiles: Of each graph; empty where they cannot be told.
        capacities: Tokens that caches have room for, of each graph that writes its own in place.
        graph_bytes: Of each graph and its weights; an engine has these, and its kernels.
        cache_bytes: Of keys and values, where the cache is full; of two where a step reads one and writes
            the next.
        problems: Why it would be refused; empty if it would not.
    """

    target: str
    sms: tuple[int, ...]
    gpu: Gpu | None
    limits: Limits
    profiles: dict[str, tuple[EngineProfile, ...]]
    capacities: dict[str, int]
    graph_bytes: dict[str, int]
    cache_bytes: int
    problems: tuple[VispruneError, ...]


def build(
    bundle: str | Path | Bundle,
    output: str | Path,
    *,
    target: str = "rtx",
    sm: Sequence[int] | None = None,
    limits: Limits | None = None,
    caps: Caps | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build TensorRT engines of every graph of a bundle, into a new bundle.

    For "rtx" no GPU is needed; for other targets they are built for the GPU of this machine. Engines that
    were built before come from the cache.

    Args:
        bundle: Exported for this target, quantized or not.
        output: The directory to make.
        target: One that has engines, see `visprune.targets`.
        sm: For "rtx" the kinds of GPU to build for; 86 by default.
        limits: How much an engine must take.
        caps: How much memory a build may take.
        force: Replace an existing bundle.
        progress: Called as the work goes on.

    Raises:
        UsageError: Options that make no sense, an output that exists, a bundle that has engines.
        UnsupportedError: The target, an SM, a limit, this GPU or this TensorRT is not possible.
        EngineError: TensorRT could not build a graph, or its process ended, or held more than it may.
        BundleError: The bundle is altered.
        MissingExtraError: TensorRT or Polygraphy is not installed.
        ExportError: The disk is full.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    destination = Path(output)
    check_destination(destination, force=force, marker=MANIFEST)
    planned = plan(source, target=target, sm=sm, limits=limits)
    for problem in planned.problems:
        raise problem
    verify(source)
    tell = progress or no_progress
    for done in tidy(existing_parent(destination)):
        tell(done, 1, 1)
    with staged(destination) as folder:
        source.copy(source.manifest.files, folder)
        engines = _engines(source.manifest, folder, planned, caps or Caps(), tell)
        _seal(source.manifest, folder, engines)
    return Bundle.open(destination)


def plan(
    bundle: Bundle, *, target: str = "rtx", sm: Sequence[int] | None = None, limits: Limits | None = None
) -> Plan:
    """What `build` would do, and all reasons why it would not; nothing is built."""
    manifest, decoder, here = bundle.manifest, bundle.manifest.decoder, machine.gpu()
    sm = None if sm is None else tuple(sm)
    found, wanted, rooms = limits or Limits(), {}, {}
    refused = tuple(problems(manifest, target, sm, found, here))
    try:
        found = resolve_limits(manifest, found)
        rooms = capacities(manifest, found) if _in_place(target) else {}
        wanted = profiles(manifest, found, in_place=bool(rooms))
    except VispruneError:
        pass  # one of the problems
    width = ITEM_SIZE[decoder.cache_dtype]
    held = [rooms.get(name, found.max_cache or 0) * _layers(graph) for name, graph in manifest.graphs.items()]
    return Plan(
        target,
        kinds(target, sm, here),
        here,
        found,
        wanted,
        rooms,
        {
            name: sum(manifest.files[file].size for file in (graph.file, graph.data) if file)
            for name, graph in manifest.graphs.items()
        },
        (1 if rooms else 2) * 2 * decoder.num_kv_heads * decoder.head_dim * width * sum(held),
        refused,
    )


def _layers(graph: Graph) -> int:
    """Whose keys and values a graph takes."""
    return sum(spec.name.startswith(PAST) for spec in graph.inputs) // 2


def _in_place(target: str) -> bool:
    """Whether caches are written in place; not where no TensorRT serves, which is one of the problems."""
    try:
        return in_place(target, str(tensorrt(target).__version__))
    except VispruneError:
        return False


def _engines(
    manifest: Manifest, folder: Path, planned: Plan, caps: Caps, progress: Progress
) -> tuple[Engine, ...]:
    """Build every graph for every SM, or take it from the cache."""
    from visprune.engines.rewrite_graph import prepare  # not for a plan: onnx_ir is another second

    version = str(tensorrt(planned.target).__version__)
    flavour = cast("Flavour", TARGETS[planned.target].engines)
    (folder / "engines").mkdir()
    forms = {
        graph: prepare(
            (folder / manifest.graphs[graph].file).absolute(), cache_capacity=planned.capacities.get(graph, 0)
        )
        for graph in planned.profiles
    }
    here = "" if TARGETS[planned.target].anywhere or planned.gpu is None else planned.gpu.name
    engines = []
    for sm in planned.sms:
        timings = cache.timing_cache(version, sm) if flavour == "tensorrt" else None  # the other has none
        for graph, made in planned.profiles.items():
            what = f"building {graph} for SM{sm}"
            progress(what, 0, 1)
            file, room = f"engines/{graph}.sm{sm}.engine", planned.capacities.get(graph, 0)
            engine = Engine(graph, file, sm, flavour, version, made, room)
            onnx, place = str(forms[graph]), (folder / file).absolute()
            request = Request(graph, onnx, str(place), flavour, sm, made, timings, caps.workspace)
            name = cache.key(manifest, request, version, here)
            if not cache.fetch(name, place):
                with scratch(folder) as talk:
                    build_in_child(request, talk, caps.host)
                cache.store(name, place)
            engines.append(engine)
            progress(what, 1, 1)
    for graph, form in forms.items():
        if form.name != Path(manifest.graphs[graph].file).name:
            form.unlink()
    return tuple(engines)


def _seal(manifest: Manifest, folder: Path, engines: tuple[Engine, ...]) -> None:
    """Write the manifest; what was copied has the hashes it had."""
    records = dict(manifest.files)
    for engine in engines:
        path = folder / engine.file
        records[engine.file] = FileRecord(path.stat().st_size, sha256(path))
    made = replace(manifest, schema_version=SCHEMA_VERSION, files=records, engines=engines)
    (folder / MANIFEST).write_text(made.to_json(), encoding="utf-8")
