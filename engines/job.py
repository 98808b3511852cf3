"""From a bundle to a bundle with engines: what is asked for is checked first, then built one by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visprune.bundle import Bundle
from visprune.engines import cache
from visprune.engines.builder import Flavour, Request, library
from visprune.engines.child import build_in_child
from visprune.errors import UnsupportedError, UsageError, VispruneError
from visprune.manifest import MANIFEST, SCHEMA_VERSION, Engine, EngineProfile, FileRecord, Manifest
from visprune.records import sha256
from visprune.runtime.profiles import Limits, profiles, resolve
from visprune.runtime.verified import verify
from visprune.staging import check_destination, existing_parent, scratch, staged, tidy
from visprune.targets import TARGETS, check_sm
from visprune.targets import target as known_target

__all__ = ["Plan", "Progress", "build", "plan"]

Progress = Callable[[str, int, int], None]
"""What is done, how far, of how much."""

_FLAVOUR: Flavour = "tensorrt_rtx"
_ON_THE_GPU = ("tensorrt", "jetpack6")  # engines that only the GPU's own machine can build


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build would do.

    Attributes:
        limits: With a number for each.
        profiles: Of each graph; empty where they cannot be told.
        graph_bytes: Of each graph and its weights; an engine has these, and its kernels.
        cache_bytes: Of keys and values, where the cache is full.
        problems: Why it would be refused; empty if it would not.
    """

    limits: Limits
    profiles: dict[str, tuple[EngineProfile, ...]]
    graph_bytes: dict[str, int]
    cache_bytes: int
    problems: tuple[VispruneError, ...]


def build(
    bundle: str | Path | Bundle,
    output: str | Path,
    *,
    target: str = "rtx",
    sm: Sequence[int] = (86,),
    limits: Limits | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build TensorRT engines of every graph of a bundle, into a new bundle.

    No GPU is needed. Engines that were built before come from the cache.

    Args:
        bundle: Exported for this target, quantized or not.
        output: The directory to make.
        target: "rtx".
        sm: The kinds of GPU to build for, such as 86.
        limits: How much an engine must take.
        force: Replace an existing bundle.
        progress: Called as the work goes on.

    Raises:
        UsageError: Options that make no sense, an output that exists, a bundle that has engines.
        UnsupportedError: The target, an SM or a limit that is not possible.
        EngineError: TensorRT could not build a graph, or its process ended.
        BundleError: The bundle is altered.
        MissingExtraError: TensorRT-RTX is not installed.
        ExportError: The disk is full.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    destination = Path(output)
    check_destination(destination, force=force, marker=MANIFEST)
    for problem in _problems(source.manifest, target, sm, limits or Limits()):
        raise problem
    verify(source)
    wanted = profiles(source.manifest, limits or Limits())
    tell = progress or (lambda what, done, total: None)
    for done in tidy(existing_parent(destination)):
        tell(done, 1, 1)
    with staged(destination) as folder:
        _copy(source, folder)
        engines = _engines(source, folder, sm, wanted, tell)
        _seal(source.manifest, folder, engines)
    return Bundle.open(destination)


def plan(
    bundle: Bundle, *, target: str = "rtx", sm: Sequence[int] = (86,), limits: Limits | None = None
) -> Plan:
    """What `build` would do, and all reasons why it would not; nothing is built."""
    manifest, decoder = bundle.manifest, bundle.manifest.decoder
    problems = tuple(_problems(manifest, target, sm, limits or Limits()))
    found, wanted = limits or Limits(), {}
    try:
        found = resolve(manifest, found)
        wanted = profiles(manifest, found)
    except VispruneError:
        pass  # one of the problems
    width = {"float32": 4, "float16": 2}[decoder.cache_dtype]
    return Plan(
        found,
        wanted,
        {
            name: sum(manifest.files[file].size for file in (graph.file, graph.data) if file)
            for name, graph in manifest.graphs.items()
        },
        2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * width * (found.max_cache or 0),
        problems,
    )


def _problems(manifest: Manifest, target: str, sms: Sequence[int], limits: Limits) -> Iterator[VispruneError]:
    """Every reason to refuse, before anything is built."""
    if target in _ON_THE_GPU:
        yield UnsupportedError(
            f"Engines for {target} are built on the machine with the GPU, which this version cannot do: "
            "it builds for rtx only.",
            "Build for --target rtx, or give the bundle's graphs to trtexec on that machine.",
        )
        return
    if not known_target(target).builds_engines:
        yield UnsupportedError(f"The target {target} has no engines.", "Build for --target rtx.")
        return
    if manifest.target != target:
        yield UnsupportedError(
            f"This bundle was exported for {manifest.target}, and engines for {target} need its graphs "
            "in another form.",
            f"Export it again: {_export_command(manifest, target)}.",
        )
    if manifest.engines:
        yield UsageError(
            "This bundle has engines already.", "Build from the bundle that they were built from."
        )
    yield from _wrong_sms(manifest, target, sms)
    try:
        profiles(manifest, limits)
    except VispruneError as error:
        yield error
    try:
        library(_FLAVOUR)
    except VispruneError as error:
        yield error


def _wrong_sms(manifest: Manifest, target: str, sms: Sequence[int]) -> Iterator[VispruneError]:
    has = TARGETS[target].sms
    listed = ", ".join(map(str, has))
    if not sms:
        yield UsageError("No SM is given.", f"Give some of: {listed}.")
    for sm in dict.fromkeys(sms):
        if sm not in has:
            yield UnsupportedError(f"The target {target} has no SM{sm}.", f"Give some of: {listed}.")
        if list(sms).count(sm) > 1:
            yield UsageError(f"SM{sm} is given {list(sms).count(sm)} times.", "Give it once.")
        try:
            check_sm(tuple(manifest.quantization.parts.values()) if manifest.quantization else (), sm)
        except UnsupportedError as error:
            yield error


def _export_command(manifest: Manifest, target: str) -> str:
    """What makes a bundle that fits, of the same model and methods."""
    before, inside = manifest.pruning, manifest.layer_pruning
    model = "" if manifest.source.model == "visprune-demo" else f" {manifest.source.model}"
    method = before.method if inside is None or before.budget.prunable else inside.method
    words = f"visprune-export{model} --method {method}"
    if before.budget.prunable:
        words += f" --keep-tokens {before.keep_tokens}"
        words += f" --then {inside.method}" if inside else ""
    return f"{words} --target {target}"


def _copy(source: Bundle, folder: Path) -> None:
    """All files of the bundle, as copies: onnx refuses external data with more than one hard link."""
    for name in source.manifest.files:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.file(name), place)


def _engines(
    source: Bundle,
    folder: Path,
    sms: Sequence[int],
    wanted: dict[str, tuple[EngineProfile, ...]],
    progress: Progress,
) -> tuple[Engine, ...]:
    """Build every graph for every SM, or take it from the cache."""
    manifest, version = source.manifest, str(library(_FLAVOUR).__version__)
    (folder / "engines").mkdir()
    engines = []
    for sm in sms:
        timings = cache.timing_cache(_FLAVOUR, version, sm)
        for graph, made in wanted.items():
            what = f"building {graph} for SM{sm}"
            progress(what, 0, 1)
            engine = Engine(graph, f"engines/{graph}.sm{sm}.engine", sm, _FLAVOUR, version, made)
            place = (folder / engine.file).absolute()
            name = cache.key(manifest, graph, _FLAVOUR, version, sm, made)
            if not cache.fetch(name, place):
                onnx = source.file(manifest.graphs[graph].file).absolute()
                request = Request(graph, str(onnx), str(place), _FLAVOUR, sm, made, timings)
                with scratch(folder) as talk:
                    build_in_child(request, talk)
                cache.store(name, place)
            engines.append(engine)
            progress(what, 1, 1)
    return tuple(engines)


def _seal(manifest: Manifest, folder: Path, engines: tuple[Engine, ...]) -> None:
    """Write the manifest; what was copied has the hashes it had."""
    records = dict(manifest.files)
    for engine in engines:
        path = folder / engine.file
        records[engine.file] = FileRecord(path.stat().st_size, sha256(path))
    made = replace(manifest, schema_version=SCHEMA_VERSION, files=records, engines=engines)
    (folder / MANIFEST).write_text(made.to_json(), encoding="utf-8")
