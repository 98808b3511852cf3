"""The options of a build of engines."""

from __future__ import annotations

from dataclasses import dataclass, field

from visprune.errors import UsageError
from visprune.runtime.backends.profiles import Limits

__all__ = ["WORKSPACE", "BuildOptions", "Caps"]

WORKSPACE = 2 << 30
"""Default of `Caps.workspace`, in bytes."""


@dataclass(frozen=True, slots=True)
class Caps:
    """How much memory a build may take.

    Attributes:
        workspace: Bytes of GPU memory that a layer of an engine may use while it runs.
        host: Bytes of memory of the subprocess that builds; None: limited only by the memory of the machine.

    Raises:
        UsageError: A value is not a whole number of at least 1.
    """

    workspace: int = WORKSPACE
    host: int | None = None

    def __post_init__(self) -> None:
        for value in (self.workspace, self.host):
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"A cap on memory is {value}.", "Give a positive whole number of bytes.")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of `build`. Whether a bundle, this GPU and this TensorRT allow them is checked in `checks`.

    Attributes:
        target: Name of a target that has engines; see `visprune.targets`.
        sm: For "rtx", the compute capabilities to build for, times ten; None: the default, 86. For other
            targets it must be None: their engines are built for the GPU of this machine.
        limits: The largest inputs that an engine must accept.
        caps: How much memory a build may take.
        force: Whether an existing bundle is replaced.
    """

    target: str = "rtx"
    sm: tuple[int, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    caps: Caps = field(default_factory=Caps)
    force: bool = False
