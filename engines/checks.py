"""Every reason not to build engines, found before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from visprune.errors import UnsupportedError, UsageError, VispruneError
from visprune.machine import Gpu
from visprune.manifest import Manifest
from visprune.optional import require
from visprune.rebuild import refuse_other_target
from visprune.runtime.backends.profiles import Limits, profiles
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

__all__ = ["kinds", "problems"]

_USUAL = (86,)  # RTX 30


def kinds(name: str, asked: Sequence[int] | None, here: Gpu | None) -> tuple[int, ...]:
    """The SMs to build for: those asked for, or that of the GPU that is here, if there is one."""
    if name in TARGETS and TARGETS[name].anywhere:
        return _USUAL if asked is None else tuple(asked)
    return (here.sm,) if here else ()


def problems(
    manifest: Manifest, name: str, asked: Sequence[int] | None, limits: Limits, here: Gpu | None
) -> Iterator[VispruneError]:
    """Why engines of a bundle cannot be built here.

    Args:
        manifest: Of the bundle.
        name: Of the target.
        asked: The SMs that were asked for; None: none were.
        limits: As they were asked for.
        here: The GPU of this machine.
    """
    try:
        known = known_target(name)
    except UsageError as error:
        yield error
        return
    if not known.engines:
        yield no_engines(name)
        return
    sms = kinds(name, asked, here)
    extra = "jetson" if known.jetson else PACKAGES[known.engines].extra
    checks: list[Callable[[], object]] = [
        partial(refuse_other_target, manifest, name),
        partial(_not_built_yet, manifest),
        partial(_right_gpu, known, asked, here),
        *(partial(_right_sm, known, sm, sms.count(sm)) for sm in dict.fromkeys(sms)),
        *(partial(check_sm, _precisions(manifest), sm) for sm in sms or (max(known.sms),)),
        partial(profiles, manifest, limits),
        partial(tensorrt, name),
        partial(require, "polygraphy", extra=extra),
        partial(require, "onnx_ir", extra=extra),
    ]
    for check in checks:
        try:
            check()
        except VispruneError as error:
            yield error


def _not_built_yet(manifest: Manifest) -> None:
    if manifest.engines:
        raise UsageError(
            "This bundle has engines already.", "Build from the bundle that they were built from."
        )


def _right_gpu(known: Target, asked: Sequence[int] | None, here: Gpu | None) -> None:
    """Whether the SMs can be told as they were: named, or by the GPU that is here."""
    if known.anywhere:
        if asked is not None and not asked:
            raise UsageError("No SM is given.", f"Give some of: {_listed(known.sms)}.")
        return
    if asked is not None:
        raise UsageError(
            f"--sm is given, and engines for {known.name} are built for the GPU that is here.",
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


def _right_sm(known: Target, sm: int, times: int) -> None:
    """Whether an SM that was asked for can be had."""
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
