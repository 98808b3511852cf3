"""Boards and cards that a plan can be made for, with the numbers of their datasheets.

A row has the number of streaming multiprocessors (SM), their highest clock, and the bandwidth of the memory.
The peak rates follow from these and from the operations of one SM in one cycle. They are *dense*. Datasheets
headline sparse rates, which are twice as high and which no LLaVA reaches. The headline of a Jetson also
counts its deep-learning accelerators (DLA), which run no language model. A multiply-accumulate is two
operations.

The figures were checked against public pages that quote these datasheets, not against the datasheets
themselves. One is derived instead: the bandwidth of the Orin Nano 4GB in Super mode is half of the 8GB's,
because the memory of the 8GB is twice as wide.

GeForce cards compute fp16 and fp8 products at half the rate when they add them up in fp32 instead of fp16.
The table has the lower rate, because attention and long sums need fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from visprune.errors import UnsupportedError, UsageError
from visprune.names import nearest

__all__ = ["BOARDS", "Board", "board"]

GIB = 1024**3

# Dense operations of one SM in one cycle, by SM and precision. Sources:
# 86: Ampere GA102 whitepaper v2. 87: the 170 sparse int8 TOPS of the AGX Orin 64GB, with 16 SMs at 1.3 GHz.
# 89: Ada whitepaper v2. 110: the 2070 sparse fp4 TFLOPS of the Jetson T5000, of which fp8 has a quarter and
# fp16 an eighth; no int8 rate was found. 120: RTX Blackwell whitepaper v1.
_RATES = {
    86: {"fp16": 512, "int8": 2048},
    87: {"fp16": 2048, "int8": 4096},
    89: {"fp16": 512, "fp8": 1024, "int8": 2048},
    110: {"fp16": 8192, "fp8": 16384},
    120: {"fp16": 512, "fp8": 1024, "int8": 2048},
}

# Memory that a model cannot use, in GiB, by `Board.shared`. Assumed, not measured. A Jetson: the system
# without a desktop, and the CUDA context. A card: the context, and what the screen takes.
_RESERVED = {True: 2.0, False: 1.0}


@dataclass(frozen=True, slots=True)
class Board:
    """A board or card with the numbers of its datasheet.

    Attributes:
        name: Name for `--device`.
        title: The maker's name.
        memory: Size of the memory in GiB.
        bandwidth: Bandwidth of the memory in GB/s (10^9).
        multiprocessors: Number of streaming multiprocessors.
        clock: Highest clock of the GPU in MHz.
        sm: Compute capability times ten, such as 87.
        shared: Whether CPU and GPU share the memory, as on a Jetson.
        source: The document that the numbers come from.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    multiprocessors: int
    clock: int
    sm: int
    shared: bool
    source: str

    @property
    def reserved(self) -> float:
        """GiB that the system and the CUDA context take; assumed: 2 on a Jetson, 1 on a card."""
        return _RESERVED[self.shared]

    @property
    def usable(self) -> int:
        """Bytes left for a model: all but `reserved`."""
        return int((self.memory - self.reserved) * GIB)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions of linear layers, most exact first. int4 stores the weights; they are used in fp16."""
        return (*(name for name in ("fp16", "fp8", "int8") if name in _RATES[self.sm]), "int4")

    def peak(self, precision: str) -> float:
        """Return the dense operations a second in a precision; for int4 weights, the rate of fp16.

        Raises:
            UnsupportedError: The GPU cannot compute in this precision, or no rate is published.
        """
        rates = _RATES[self.sm] | {"int4": _RATES[self.sm]["fp16"]}
        if precision not in rates:
            raise UnsupportedError(
                f"No {precision} rate of {self.title} is known.",
                f"Plan with one of: {', '.join(self.precisions)}.",
            )
        return rates[precision] * self.multiprocessors * self.clock * 1e6


_NANO = "Jetson Orin Nano Series Modules Data Sheet, DS-11105-001"
_NX = "Jetson Orin NX Series Modules Data Sheet, DS-10712-001 v1.7"
_AGX = "Jetson AGX Orin Series Modules Data Sheet, DS-10662-001 v1.8"
_SUPER = "NVIDIA JetPack 6.2 Brings Super Mode to NVIDIA Jetson Orin Nano and Jetson Orin NX Modules"
_THOR = "Jetson Thor Series Modules Data Sheet, T5000"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper v1"
_GEFORCE = "NVIDIA GeForce product specifications"

BOARDS = {
    b.name: b
    for b in (
        Board("orin-nano-4gb", "Jetson Orin Nano 4GB", 4, 34.0, 4, 625, 87, True, _NANO),
        Board("orin-nano-4gb-super", "Jetson Orin Nano 4GB, Super", 4, 51.0, 4, 1020, 87, True, _SUPER),
        Board("orin-nano-8gb", "Jetson Orin Nano 8GB", 8, 68.0, 8, 625, 87, True, _NANO),
        Board("orin-nano-8gb-super", "Jetson Orin Nano 8GB, Super", 8, 102.0, 8, 1020, 87, True, _SUPER),
        Board("orin-nx-8gb", "Jetson Orin NX 8GB", 8, 102.0, 8, 765, 87, True, _NX),
        Board("orin-nx-8gb-super", "Jetson Orin NX 8GB, Super", 8, 102.0, 8, 1173, 87, True, _NX),
        Board("orin-nx-16gb", "Jetson Orin NX 16GB", 16, 102.0, 8, 918, 87, True, _NX),
        Board("orin-nx-16gb-super", "Jetson Orin NX 16GB, Super", 16, 102.0, 8, 1173, 87, True, _NX),
        Board("agx-orin-32gb", "Jetson AGX Orin 32GB", 32, 204.8, 14, 939, 87, True, _AGX),
        Board("agx-orin-64gb", "Jetson AGX Orin 64GB", 64, 204.8, 16, 1300, 87, True, _AGX),
        Board("agx-thor", "Jetson AGX Thor (T5000)", 128, 273.0, 20, 1575, 110, True, _THOR),
        Board("rtx-3060", "GeForce RTX 3060 12GB", 12, 360.0, 28, 1777, 86, False, _GEFORCE),
        Board("rtx-3090", "GeForce RTX 3090", 24, 936.0, 82, 1695, 86, False, _AMPERE),
        Board("rtx-4060", "GeForce RTX 4060", 8, 272.0, 24, 2460, 89, False, _GEFORCE),
        Board("rtx-4070", "GeForce RTX 4070", 12, 504.0, 46, 2475, 89, False, _GEFORCE),
        Board("rtx-4090", "GeForce RTX 4090", 24, 1008.0, 128, 2520, 89, False, _ADA),
        Board("rtx-5090", "GeForce RTX 5090", 32, 1792.0, 170, 2407, 120, False, _BLACKWELL),
    )
}


def board(name: str) -> Board:
    """Return the board of a name.

    Raises:
        UsageError: No board has this name. The hint suggests the nearest, and lists all.
    """
    if name not in BOARDS:
        close = nearest(name, [*BOARDS, "this"])
        guess = f"Did you mean {close!r}? " if close else ""
        raise UsageError(
            f"There is no device {name!r}.",
            f"{guess}Known devices: {', '.join(BOARDS)}; this, with --calibration.",
        )
    return BOARDS[name]
