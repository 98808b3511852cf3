"""Checks of a build: every reason to refuse it, found before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from visprune.engines.build_options import BuildOptions
from visprune.errors import UnsupportedError, UsageError, VispruneError
from visprune.machine import Gpu
from visprune.manifest import Manifest
from visprune.optional import require
from visprune.rebuild import refuse_other_target
from visprune.runtime.backends.profiles import profiles
from visprune.targets import (
    PACKAGES,
    TARGETS,
    Target,
    check_sm,
    export_for,
    no_engines,
    tensorrt,
)
from visprune.targets import target as known_target

__all__ = ["problems", "sms_to_build"]

_DEFAULT_SMS = (86,)  # GeForce RTX 30


def sms_to_build(options: BuildOptions, here: Gpu | None) -> tuple[int, ...]:
    """Return the compute capabilities to build for, times ten; empty if a GPU is needed to tell, and missing.

    Args:
        options: The options of the build.
        here: The GPU of this machine.
    """
    if options.target in TARGETS and TARGETS[options.target].anywhere:
        return _DEFAULT_SMS if options.sm is None else options.sm
    return (here.sm,) if here else ()


def problems(manifest: Manifest, options: BuildOptions, here: Gpu | None) -> Iterator[VispruneError]:
    """Yield every reason why the engines of a bundle cannot be built on this machine.

    Args:
        manifest: Manifest of the bundle.
        options: The options of the build.
        here: The GPU of this machine.
    """
    name = options.target
    try:
        known = known_target(name)
    except UsageError as error:
        yield error
        return
    if not known.engines:
        yield no_engines(name)
        return
    sms = sms_to_build(options, here)
    extra = "jetson" if known.jetson else PACKAGES[known.engines].extra
    checks: list[Callable[[], object]] = [
        partial(refuse_other_target, manifest, name),
        partial(_refuse_engines, manifest),
        partial(_check_gpu, known, options.sm, here),
        *(partial(_check_requested_sm, known, sm, sms.count(sm)) for sm in dict.fromkeys(sms)),
        *(partial(check_sm, _precisions(manifest), sm) for sm in sms or (max(known.sms),)),
        partial(profiles, manifest, options.limits),
        partial(tensorrt, name),
        partial(require, "polygraphy", extra=extra),
        partial(require, "onnx_ir", extra=extra),
    ]
    for check in checks:
        try:
            check()
        except VispruneError as error:
            yield error


def _refuse_engines(manifest: Manifest) -> None:
    """Refuse a bundle that has engines."""
    if manifest.engines:
        raise UsageError(
            "This bundle has engines already.", "Build from the bundle that they were built from."
        )


def _check_gpu(known: Target, requested: Sequence[int] | None, here: Gpu | None) -> None:
    """Check the SMs given for a target that is built anywhere, or this machine's GPU for another target."""
    if known.anywhere:
        if requested is not None and not requested:
            raise UsageError("No SM is given.", f"Give some of: {_listed(known.sms)}.")
        return
    if requested is not None:
        raise UsageError(
            f"--sm is given, but engines for {known.name} are built for the GPU of this machine.",
            "Leave --sm out.",
        )
    if here is None:
        raise UnsupportedError(
            f"No NVIDIA GPU is found here, and engines for {known.name} are built where they run.",
            f"Copy the bundle to the {'Jetson' if known.jetson else 'machine with the GPU'} and build there.",
        )
    if here.sm not in known.sms:
        raise UnsupportedError(
            f"This GPU is SM{here.sm} ({here.name}), and {known.name} is for {_listed(known.sms)}.",
            export_for(here.sm),
        )


def _check_requested_sm(known: Target, sm: int, times: int) -> None:
    """Check that the target has an SM, and that it is given once."""
    if known.anywhere and sm not in known.sms:
        raise UnsupportedError(
            f"The target {known.name} has no SM{sm}.", f"Give some of: {_listed(known.sms)}."
        )
    if times > 1:
        raise UsageError(f"SM{sm} is given {times} times.", "Give it once.")


def _precisions(manifest: Manifest) -> tuple[str, ...]:
    return tuple(manifest.quantization.parts.values()) if manifest.quantization else ()


def _listed(sms: Sequence[int]) -> str:
    return ", ".join(map(str, sms))
