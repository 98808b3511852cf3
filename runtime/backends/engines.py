"""Selection of the engines that this machine can run, and the check that they fit into the GPU's memory."""

from __future__ import annotations

import mmap
import platform
import shlex
from contextlib import suppress
from math import prod

import numpy as np

from visprune import machine
from visprune.bundle import Bundle
from visprune.cache_names import PAST
from visprune.errors import BundleError, UnsupportedError, VispruneError
from visprune.manifest import Engine, Graph, Manifest
from visprune.rebuild import export_command
from visprune.runtime.backends.device import Device, DeviceMemoryError
from visprune.runtime.backends.residents import Resident, Residents
from visprune.runtime.backends.runner import BackendOptions, Runner, Specs
from visprune.runtime.backends.trt import TrtRunner, cache_capacity
from visprune.targets import PACKAGES, TARGETS, Target, export_for, tensorrt

__all__ = ["Engines"]

_FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class Engines:
    """Opens the engines of one bundle, which share the GPU, its stream and its memory.

    Args:
        bundle: The bundle.
        options: `provider` is "tensorrt" or "tensorrt-rtx". With `low_memory`, an engine is loaded when it is
            used, and others are unloaded if there is no room for it.

    Raises:
        MissingExtraError: A package is not installed.
        UnsupportedError: There is no GPU, the bundle has no engines for the GPU or for the installed version
            of TensorRT, or the GPU has too little free memory.
        BundleError: The manifest's engines do not fit its graphs.
    """

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        self._bundle, self._low_memory = bundle, options.low_memory
        flavour = _FLAVOURS[options.provider]
        _check_flavour(bundle, flavour, options.provider)
        self._trt = tensorrt(bundle.manifest.target)
        self._device = Device()
        self._engines = _usable_engines(bundle, flavour, str(self._trt.__version__), self._device.sm)
        self._check_memory()
        self._residents = Residents(
            self._open, self._size, self._device.free_memory, evict=options.low_memory
        )
        self._device.make_room = self._residents.make_room

    def __call__(self, graph: str) -> Runner:
        """Return the runner of a graph.

        Raises:
            BundleError: The engine cannot be loaded, or differs from its description in the manifest.
            UnsupportedError: The GPU has too little free memory.
        """
        if not self._low_memory:
            self._residents.use(graph)
        interface = self._bundle.manifest.graphs[graph]
        specs = Specs(interface.inputs, interface.outputs, cache_capacity(self._engines[graph], interface))
        return Resident(graph, specs, self._residents)

    def _open(self, graph: str) -> Runner:
        engine, interface = self._engines[graph], self._bundle.manifest.graphs[graph]
        self._device.enter()
        self._device.trim()  # TensorRT allocates memory of its own, and cannot use blocks kept for reuse
        # Mapped, because a GPU that shares the machine's memory has no room for a copy.
        with (
            self._bundle.file(engine.file).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return TrtRunner(self._trt, self._device, engine, interface, content)

    def _size(self, graph: str) -> int:
        return self._bundle.manifest.files[self._engines[graph].file].size

    def _check_memory(self) -> None:
        """Refuse engines and caches that cannot fit, before loading them. Working memory is not counted."""
        graphs = self._bundle.manifest.graphs
        sizes = [self._size(graph) for graph in self._engines]
        weights = max(sizes) if self._low_memory else sum(sizes)
        cache = sum(_cache_bytes(engine, graphs[graph]) for graph, engine in self._engines.items())
        free = self._device.free_memory()
        if weights + cache > free:
            raise DeviceMemoryError(weights + cache, free)


def _check_flavour(bundle: Bundle, flavour: str, provider: str) -> None:
    """Refuse a bundle that has no engines of a provider's package."""
    manifest, name = bundle.manifest, PACKAGES[flavour].name
    built_for = TARGETS[manifest.target].engines if manifest.target in TARGETS else ""
    if built_for != flavour:
        other = next((p for p, of in _FLAVOURS.items() if of == built_for), None)
        raise UnsupportedError(
            f"This bundle was exported for {manifest.target}, and {provider} needs engines of {name}.",
            (f"Use --provider {other}, or export" if other else "Export")
            + f" again and build: {export_command(manifest, _likely_target(flavour))}.",
        )
    if not any(engine.flavour == flavour for engine in manifest.engines):
        raise UnsupportedError(
            "This bundle has no engines.", f"Build them: {_build_command(manifest, bundle.path)}."
        )


def _likely_target(flavour: str) -> str:
    """Guess the target of this machine among those of a package, by GPU, installed TensorRT and processor."""
    here = machine.gpu()

    def unlike(target: Target) -> tuple[bool, ...]:
        installed = False
        with suppress(VispruneError):
            installed = bool(tensorrt(target.name))
        return (
            here is not None and here.sm not in target.sms,
            not installed,
            target.jetson != (platform.machine() == "aarch64"),
            installed and target.flavour != "native",  # the better form, if its version is installed
        )

    return min((t for t in TARGETS.values() if t.engines == flavour), key=unlike).name


def _usable_engines(bundle: Bundle, flavour: str, version: str, sm: int) -> dict[str, Engine]:
    """Return the engine of each graph that a stage names, for this package, version and GPU.

    Raises:
        UnsupportedError: The bundle has no engines for this GPU or version.
        BundleError: An engine is missing, or its profiles do not fit its graph.
    """
    manifest = bundle.manifest
    engines = [engine for engine in manifest.engines if engine.flavour == flavour]
    again = f"Build engines again, from the bundle without any: {_build_command(manifest, 'DIR', sm)}."
    if sm not in (sms := sorted({engine.sm for engine in engines})):
        listed = ", ".join(f"SM{one}" for one in sms)
        raise UnsupportedError(
            f"This bundle has engines for {listed}, and this GPU is SM{sm}.",
            again if sm in TARGETS[manifest.target].sms else export_for(sm),
        )
    found = {engine.graph: engine for engine in engines if engine.sm == sm}
    for graph in {stage.graph: None for stage in manifest.stages}:
        if graph not in found:
            raise BundleError(f"The bundle has no engine of {graph} for SM{sm}.", again)
        if found[graph].version != version:
            raise UnsupportedError(
                f"The engines were built by {PACKAGES[flavour].name} {found[graph].version} and run only "
                f"with that version, and {version} is installed.",
                again,
            )
        _check_profiles(found[graph], manifest.graphs[graph])
    return found


def _check_profiles(engine: Engine, interface: Graph) -> None:
    """Refuse a range that belongs to no input, or that has another number of dimensions than its input."""
    places = {spec.name: len(spec.shape) or 1 for spec in interface.inputs}
    for profile in engine.profiles:
        for name, ranges in profile.inputs.items():
            if len(ranges.most) != places.get(name):
                raise BundleError(
                    f"The profiles of {engine.file} do not fit the input {name!r}.",
                    "Build the engines again.",
                )


def _cache_bytes(engine: Engine, interface: Graph) -> int:
    """Return the bytes of keys and values at their longest.

    Twice as many if the cache is not written in place: the longer cache is an output while the one before is
    still an input.
    """
    tokens, copies = cache_capacity(engine, interface) or 0, 1 if engine.cache_capacity else 2
    past = [spec for spec in interface.inputs if spec.name.startswith(PAST)]
    sizes = [np.dtype(s.dtype).itemsize * prod(d for d in s.shape if isinstance(d, int)) for s in past]
    return copies * tokens * sum(sizes)


def _build_command(manifest: Manifest, folder: object, sm: int | None = None) -> str:
    only = f" --sm {sm}" if sm and TARGETS[manifest.target].anywhere else ""
    return f"visprune-build {shlex.quote(str(folder))} --target {manifest.target}{only} -o NEW"
