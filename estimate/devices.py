"""Devices that a plan is made for: a board with its datasheet, or a machine that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from visprune.errors import UnsupportedError, UsageError
from visprune.estimate.boards import Board
from visprune.estimate.measured_rates import Calibration
from visprune.estimate.roofline import PRECISIONS, Rates
from visprune.targets import TARGETS, check_sm

__all__ = ["ASSUMED", "PlannedDevice", "board_device", "check_precision", "measured_device"]

ASSUMED = Rates(0.5, 0.5, 0.7)
"""Shares of a board's peak rates that a model is assumed to reach where nothing was measured."""


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """A device that a plan is made for.

    Attributes:
        name: Name of the board, or "this" for the machine of a calibration.
        title: The maker's name of the board, or the processor or GPU that was measured.
        usable: Bytes of memory left for a model; None where that is not known.
        item_size: Bytes of a floating-point number that is not quantized.
        peaks: Rates of the datasheet, by precision; empty where there is no datasheet.
        rates: Expected rates, by precision.
        sources: Sentences that say where the numbers come from, and what is assumed.
        sm: SM of the GPU; None for a machine that is not in the table of boards.
        calibrated_bytes: The most bytes that a stage of the calibration read; None without a calibration.
        not_built: Precisions that this version of visprune builds no engine in for the device.
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
        """Precisions that a plan can be made in, most exact first."""
        return tuple(name for name in PRECISIONS if name in self.rates)


def board_device(board: Board, calibration: Calibration | None = None) -> PlannedDevice:
    """Return a board as a device, at the measured or the assumed shares of its peak rates.

    Args:
        board: A row of the table of boards.
        calibration: A measurement on the board. None: the shares are `ASSUMED`.

    Raises:
        UsageError: The calibration comes from a CPU, or from something faster than this board.
    """
    floats = board.peak("fp16")
    peaks = {p: Rates(board.peak(p), floats, board.bandwidth * 1e9) for p in board.precisions}
    shares = dict.fromkeys(peaks, ASSUMED)
    basis = (
        f"Assumed, not measured: {ASSUMED.linear:.0%} of the peak operations and {ASSUMED.bytes:.0%} of the "
        "bandwidth are reached. Measure, and give --calibration."
    )
    if calibration is not None:
        shares = _measured_shares(board, peaks, calibration)
        basis = f"Calibrated on {calibration.describe()}."
    return PlannedDevice(
        name=board.name,
        title=board.title,
        usable=board.usable,
        item_size=2,
        peaks=peaks,
        rates={p: _scaled(peaks[p], shares[p]) for p in peaks},
        sources=(
            f"{board.source}: {board.memory} GiB at {board.bandwidth:g} GB/s, {board.multiprocessors} SMs at "
            f"up to {board.clock} MHz; dense operations of the GPU alone.",
            f"Assumed: {board.reserved:g} GiB of the memory are taken by the system and the CUDA context.",
            basis,
        ),
        sm=board.sm,
        not_built=_not_built(board),
        calibrated_bytes=calibration.bytes if calibration else None,
    )


def measured_device(calibration: Calibration) -> PlannedDevice:
    """Return the machine of a calibration as a device, with the precisions that were measured on it."""
    return PlannedDevice(
        name="this",
        title=calibration.machine,
        usable=calibration.memory,
        item_size=calibration.item_size,
        peaks={},
        rates=calibration.rates,
        sources=(f"Calibrated on {calibration.describe()}.",),
        calibrated_bytes=calibration.bytes,
    )


def _measured_shares(board: Board, peaks: dict[str, Rates], calibration: Calibration) -> dict[str, Rates]:
    """Return the shares of the peak rates that were reached, by precision.

    A precision that was not measured gets the shares of the first that was.
    """
    if calibration.provider == "cpu":
        raise UsageError(
            f"The calibration was measured on a CPU, which says nothing of {board.title}.",
            "Give one that was measured on it, or plan for --device this.",
        )
    measured = {p: rates for p, rates in calibration.rates.items() if p in peaks}
    if not measured:
        raise UsageError(
            f"The calibration measured {', '.join(calibration.rates)}, for which no rate of {board.title} is "
            "known.",
            f"Measure a bundle of one of: {', '.join(peaks)}.",
        )
    shares = {
        p: Rates(r.linear / peaks[p].linear, r.attention / peaks[p].attention, r.bytes / peaks[p].bytes)
        for p, r in measured.items()
    }
    highest = max(max(share.linear, share.bytes) for share in shares.values())
    if highest > 1.0:
        raise UsageError(
            f"The calibration reached {highest:.2g} times what the datasheet of {board.title} allows.",
            "Name the device that it was measured on.",
        )
    first = next(iter(shares.values()))
    return {p: shares.get(p, first) for p in peaks}


def _scaled(peaks: Rates, shares: Rates) -> Rates:
    return Rates(peaks.linear * shares.linear, peaks.attention * shares.attention, peaks.bytes * shares.bytes)


def _not_built(board: Board) -> tuple[str, ...]:
    """Return the precisions that no target of this version takes to the board's SM."""
    targets = [target for target in TARGETS.values() if board.sm in target.sms]
    built = {name for target in targets for name in ("fp16", *target.quantized)}
    return tuple(name for name in board.precisions if name not in built)


def check_precision(device: PlannedDevice, precision: str) -> None:
    """Refuse a precision that a device does not have, or that was not measured on it.

    Raises:
        UsageError: There is no such precision.
        UnsupportedError: The device cannot be planned in this precision.
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
