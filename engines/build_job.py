"""The build of a bundle with engines: check the options first, then build the engines one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from visprune import machine
from visprune.bundle import Bundle
from visprune.cache_names import PAST
from visprune.engines import cache
from visprune.engines.build_options import BuildOptions, Caps
from visprune.engines.build_process import build_in_subprocess
from visprune.engines.builder import Flavour, Request
from visprune.engines.checks import problems, sms_to_build
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

__all__ = ["BuildPlan", "build", "build_bundle", "plan"]


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What a build with some options would make.

    Attributes:
        target: Name of the target.
        sms: Compute capabilities to build for, times ten; empty if they depend on a GPU and none is found.
        gpu: The GPU of this machine; None if none is found.
        limits: The limits, with a number for each.
        profiles: The optimization profiles of each graph; empty if the limits are refused.
        capacities: For each graph that writes its cache in place, the tokens that the cache has room for.
        graph_bytes: Bytes of each graph and its weights. Its engine holds the weights too, and its kernels.
        cache_bytes: Bytes of the keys and values in a full cache. If the cache is not written in place they
            count twice, because a step reads one cache and writes the next.
        problems: Why the build would be refused; empty if it would not.
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

    For "rtx" no GPU is needed; for other targets the engines are built for the GPU of this machine. Engines
    that were built before come from the cache.

    Args:
        bundle: A bundle that was exported for this target, quantized or not.
        output: The directory to make.
        target: Name of a target that has engines; see `visprune.targets`.
        sm: For "rtx", the compute capabilities to build for, times ten; 86 by default.
        limits: The largest inputs that an engine must accept.
        caps: How much memory a build may take.
        force: Replace an existing bundle.
        progress: Called as the work goes on.

    Raises:
        UsageError: An option makes no sense, the output exists, or the bundle has engines already.
        UnsupportedError: The target, an SM, a limit, this GPU or this TensorRT is not supported.
        EngineError: TensorRT could not build a graph, or its subprocess ended or held more memory than it
            may.
        BundleError: The bundle is altered.
        MissingExtraError: TensorRT or Polygraphy is not installed.
        ExportError: The disk is full.
    """
    options = BuildOptions(
        target, None if sm is None else tuple(sm), limits or Limits(), caps or Caps(), force
    )
    return build_bundle(bundle, output, options, progress=progress)


def build_bundle(
    bundle: str | Path | Bundle,
    output: str | Path,
    options: BuildOptions,
    *,
    progress: Progress | None = None,
) -> Bundle:
    """Build the engines of a bundle with these options; see `build`."""
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    destination = Path(output)
    check_destination(destination, force=options.force, marker=MANIFEST)
    planned = plan(source, options)
    for problem in planned.problems:
        raise problem
    verify(source)
    tell = progress or no_progress
    for done in tidy(existing_parent(destination)):
        tell(done, 1, 1)
    with staged(destination) as folder:
        source.copy(source.manifest.files, folder)
        engines = _build_engines(source.manifest, folder, planned, options.caps, tell)
        _write_manifest(source.manifest, folder, engines)
    return Bundle.open(destination)


def plan(bundle: Bundle, options: BuildOptions) -> BuildPlan:
    """Return what `build` would make, and all reasons why it would refuse to. Nothing is built."""
    manifest, decoder, here = bundle.manifest, bundle.manifest.decoder, machine.gpu()
    limits, rooms, wanted = options.limits, {}, {}
    refused = tuple(problems(manifest, options, here))
    try:
        limits = resolve_limits(manifest, limits)
        rooms = capacities(manifest, limits) if _writes_in_place(options.target) else {}
        wanted = profiles(manifest, limits, in_place=bool(rooms))
    except VispruneError:
        pass  # it is one of `refused`
    tokens = sum(
        rooms.get(name, limits.max_cache or 0) * _cached_layers(graph)
        for name, graph in manifest.graphs.items()
    )
    width = ITEM_SIZE[decoder.cache_dtype]
    return BuildPlan(
        target=options.target,
        sms=sms_to_build(options, here),
        gpu=here,
        limits=limits,
        profiles=wanted,
        capacities=rooms,
        graph_bytes={
            name: sum(manifest.files[file].size for file in (graph.file, graph.data) if file)
            for name, graph in manifest.graphs.items()
        },
        cache_bytes=(1 if rooms else 2) * 2 * decoder.num_kv_heads * decoder.head_dim * width * tokens,
        problems=refused,
    )


def _cached_layers(graph: Graph) -> int:
    """Return the number of layers whose keys and values a graph reads."""
    return sum(spec.name.startswith(PAST) for spec in graph.inputs) // 2


def _writes_in_place(target: str) -> bool:
    """Check whether this TensorRT writes caches in place. False without a TensorRT that can be used."""
    try:
        return in_place(target, str(tensorrt(target).__version__))
    except VispruneError:
        return False


def _build_engines(
    manifest: Manifest, folder: Path, planned: BuildPlan, caps: Caps, progress: Progress
) -> tuple[Engine, ...]:
    """Build each graph for each SM, or take its engine from the cache."""
    from visprune.engines.rewrite_graph import prepare  # imports onnx_ir for a second, which a plan can spare

    version = str(tensorrt(planned.target).__version__)
    flavour = cast("Flavour", TARGETS[planned.target].engines)
    (folder / "engines").mkdir()
    rewritten = {
        graph: prepare(
            (folder / manifest.graphs[graph].file).absolute(), cache_capacity=planned.capacities.get(graph, 0)
        )
        for graph in planned.profiles
    }
    here = "" if TARGETS[planned.target].anywhere or planned.gpu is None else planned.gpu.name
    engines = []
    for sm in planned.sms:
        # TensorRT-RTX has no timing cache.
        timings = cache.timing_cache(version, sm) if flavour == "tensorrt" else None
        for graph, made in planned.profiles.items():
            step = f"building {graph} for SM{sm}"
            progress(step, 0, 1)
            file, room = f"engines/{graph}.sm{sm}.engine", planned.capacities.get(graph, 0)
            engine = Engine(graph, file, sm, flavour, version, made, room)
            onnx, destination = str(rewritten[graph]), (folder / file).absolute()
            request = Request(graph, onnx, str(destination), flavour, sm, made, timings, caps.workspace)
            key = cache.key(manifest, request, version, here)
            if not cache.fetch(key, destination):
                with scratch(folder) as exchange:
                    build_in_subprocess(request, exchange, caps.host)
                cache.store(key, destination)
            engines.append(engine)
            progress(step, 1, 1)
    for graph, onnx_file in rewritten.items():
        if onnx_file.name != Path(manifest.graphs[graph].file).name:
            onnx_file.unlink()
    return tuple(engines)


def _write_manifest(manifest: Manifest, folder: Path, engines: tuple[Engine, ...]) -> None:
    """Write the manifest of the new bundle. The hashes of copied files are those of the old one."""
    records = dict(manifest.files)
    for engine in engines:
        path = folder / engine.file
        records[engine.file] = FileRecord(path.stat().st_size, sha256(path))
    made = replace(manifest, schema_version=SCHEMA_VERSION, files=records, engines=engines)
    (folder / MANIFEST).write_text(made.to_json(), encoding="utf-8")
