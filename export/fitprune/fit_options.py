"""The options of a FitPrune fit, and the fields that it shares with an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from visprune.errors import UsageError
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.options import Option, documented

__all__ = ["FitOptions", "FitSamples", "MaxPrunePoints"]

FitSamples: TypeAlias = Annotated[
    str | Path | None,
    Option(
        'Samples to fit a FitPrune recipe on: lines of {"image": path, "prompt": text}.',
        metavar="FILE",
        flags=("--data",),
        shows="a bundled set of 16",
    ),
]
MaxPrunePoints: TypeAlias = Annotated[
    int | None, Option("The most layers a fitted recipe may prune at.", metavar="G", shows="any")
]


@documented
@dataclass(frozen=True, slots=True)
class FitOptions(CheckpointOptions):
    """Options of a fit, checked as far as that is possible without the model.

    Raises:
        UsageError: A value that makes no sense.
    """

    ratio: Annotated[float, Option("Fraction of the visual work to KEEP, in (0, 1].")]
    data: FitSamples = None
    max_prune_points: MaxPrunePoints = None
    samples: Annotated[int | None, Option("Number of samples to draw.", metavar="N", shows="all")] = None
    seed: Annotated[int, Option("Seed to draw samples with.")] = 0
    device: Annotated[str, Option("Where PyTorch computes: cpu or cuda.")] = "cpu"
    force: Annotated[bool, Option("Replace an existing recipe.")] = False

    def __post_init__(self) -> None:
        CheckpointOptions.__post_init__(self)  # `super()` does not work in a dataclass with slots
        if not 0.0 < self.ratio <= 1.0:  # also refuses NaN
            raise UsageError(
                f"The ratio {self.ratio:g} is outside (0, 1].",
                "Give the fraction of the visual work to keep, for example 0.4.",
            )
        if self.max_prune_points is not None and self.max_prune_points < 1:
            raise UsageError(
                f"{self.max_prune_points} prune points cannot reach a ratio.", "Give a number of at least 1."
            )
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"{self.samples} samples show nothing.", "Give a number of at least 1.")
        if self.seed < 0:
            raise UsageError(f"The seed {self.seed} is negative.", "Give a number of at least 0.")
