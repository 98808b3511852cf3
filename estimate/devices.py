"""What a plan is made for: a board by its datasheet, or a machine that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from visprune.errors import UnsupportedError, UsageError
from visprune.estimate.boards import Board
from visprune.estimate.measured_rates import Calibration
from visprune.estimate.roofline import PRECISIONS, Rates
from visprune.targets import TARGETS, check_sm

__all__ = ["ASSUMED", "Device", "check_precision", "measured_machine", "of_board"]

ASSUMED = Rates(0.5, 0.5, 0.7)
"""The shares of a board's peaks that are taken to be reached where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model shall run.

    Attributes:
        name: As the user gave it.
        title: What it is.
        usable: Bytes it has left for a model; None where that is not known.
        item_size: Bytes of a float there.
        peaks: By precision, the most its datasheet allows; empty where there is none.
        rates: By precision, what is expected of it.
        sources: Where that comes from, and what is assumed.
        sm: Of its GPU; None for a machine that is not in the table.
        calibrated_bytes: Most bytes that a stage of the calibration read; None without one.
        not_built: Precisions that this version makes no engine of for it.
    """

    name: str
    title: str
    usable: int | None
    item_size: int
    peaks: dict[str, Rates]
    rates: dict[str, Rates]
    sources: tuple[str, ...]
    sm: int | None = None
    calibrated_bytes: int | None = None
    not_built: tuple[str, ...] = ()

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it can be planned for with, most exact first."""
        return tuple(name for name in PRECISIONS if name in self.rates)


def of_board(found: Board, calibration: Calibration | None = None) -> Device:
    """A board, at the shares of its peaks that were measured on it, or that are assumed.

    Raises:
        UsageError: The calibration comes from a CPU, or from something faster than this board.
    """
    floats = found.peak("fp16")
    peaks = {p: Rates(found.peak(p), floats, found.bandwidth * 1e9) for p in found.precisions}
    shares = dict.fromkeys(peaks, ASSUMED)
    basis = (
        f"Assumed, not measured: {ASSUMED.linear:.0%} of the peak operations and {ASSUMED.bytes:.0%} of the "
        "bandwidth are reached. Measure, and give --calibration."
    )
    if calibration is not None:
        shares = _shares(found, peaks, calibration)
        basis = f"Calibrated on {calibration.describe()}."
    taken = found.memory - found.usable / 1024**3
    return Device(
        name=found.name,
        title=found.title,
        usable=found.usable,
        item_size=2,
        peaks=peaks,
        rates={p: _scaled(peaks[p], shares[p]) for p in peaks},
        sources=(
            f"{found.source}: {found.memory} GiB at {found.bandwidth:g} GB/s, {found.multiprocessors} SMs at "
            f"up to {found.clock} MHz; dense operations of the GPU alone.",
            f"Assumed: {taken:g} GiB of the memory are taken by the system and the CUDA context.",
            basis,
        ),
        sm=found.sm,
        not_built=_not_built(found),
        calibrated_bytes=calibration.bytes if calibration else None,
    )


def measured_machine(calibration: Calibration) -> Device:
    """The machine that a calibration was measured on, in the precisions that were measured there."""
    return Device(
        name="this",
        title=calibration.machine,
        usable=calibration.memory,
        item_size=calibration.item_size,
        peaks={},
        rates=calibration.rates,
        sources=(f"Calibrated on {calibration.describe()}.",),
        calibrated_bytes=calibration.bytes,
    )


def _shares(found: Board, peaks: dict[str, Rates], calibration: Calibration) -> dict[str, Rates]:
    """What was reached of the peaks; a precision that was not measured reaches what the first one did."""
    if calibration.provider == "cpu":
        raise UsageError(
            f"The calibration was measured on a CPU, which says nothing of {found.title}.",
            "Give one that was measured on it, or plan for --device this.",
        )
    measured = {p: rates for p, rates in calibration.rates.items() if p in peaks}
    if not measured:
        raise UsageError(
            f"The calibration measured {', '.join(calibration.rates)}, which {found.title} has not.",
            f"Measure a bundle of one of: {', '.join(peaks)}.",
        )
    shares = {
        p: Rates(r.linear / peaks[p].linear, r.attention / peaks[p].attention, r.bytes / peaks[p].bytes)
        for p, r in measured.items()
    }
    highest = max(max(share.linear, share.bytes) for share in shares.values())
    if highest > 1.0:
        raise UsageError(
            f"The calibration reached {highest:.2g} times what the datasheet of {found.title} allows.",
            "Name the device that it was measured on.",
        )
    first = next(iter(shares.values()))
    return {p: shares.get(p, first) for p in peaks}


def _scaled(peaks: Rates, shares: Rates) -> Rates:
    return Rates(peaks.linear * shares.linear, peaks.attention * shares.attention, peaks.bytes * shares.bytes)


def _not_built(found: Board) -> tuple[str, ...]:
    """What no target of this version takes to such a GPU."""
    targets = [target for target in TARGETS.values() if found.sm in target.sms]
    made = {name for target in targets for name in ("fp16", *target.quantized)}
    return tuple(name for name in found.precisions if name not in made)


def check_precision(device: Device, precision: str) -> None:
    """Refuse a precision that a device has not, or that was not measured there.

    Raises:
        UsageError: There is no such precision.
        UnsupportedError: The device has not got it.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"There is no precision {precision!r}.", f"Give one of: {', '.join(PRECISIONS)}.")
    if device.sm is not None:
        check_sm((precision,), device.sm)
    if precision not in device.rates:
        raise UnsupportedError(
            f"Nothing is known of {precision} on {device.title}.",
            f"Plan with one of: {', '.join(device.precisions)}.",
        )
