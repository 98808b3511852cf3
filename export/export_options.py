"""What a user may ask of an export, and which methods that means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visprune.budget import check_ratio, check_request
from visprune.errors import UsageError
from visprune.manifest import Scope
from visprune.pruning.base import LayerPruner, VisionPruner
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.keep_all import KeepAll
from visprune.pruning.registry import load_method, method_name
from visprune.targets import DTYPES

__all__ = ["Asked", "ExportOptions", "Methods"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One method with the budget asked for: a ratio, a count, or neither."""

    name: str
    ratio: float | None = None
    keep_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Methods:
    """A method before the LLM, and perhaps one inside it, each with what was asked of it."""

    before: VisionPruner
    before_asked: Asked
    inside: LayerPruner | None = None
    inside_asked: Asked | None = None


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export, checked as far as that is possible without the model.

    Attributes:
        method: Name of a pruning method, or an instance of one with its own knobs.
        ratio: Fraction kept, in (0, 1]: of the visual tokens, or of the visual work for fitprune.
        keep_tokens: Visual tokens kept of one image, instead of a ratio.
        then: A method inside the LLM after one before it: its name, or "NAME:RATIO", or an instance. Its
            ratio counts what the first one left.
        recipe: A file that `visprune fit` wrote, for fitprune.
        calibration: Samples to fit fitprune's recipe on, where none is given; a bundled set if None.
        max_prune_points: Most layers that a fitted recipe may prune at.
        anyres_scope: Where a picture is several tiles: "tile" keeps as many tokens of each, "global" chooses
            among all of them.
        segments: Parts to cut the decoder into where nothing is pruned inside it.
        target: Platform, see `visprune.targets`.
        dtype: "fp32" or "fp16"; the target's own if None.
        verify: Whether to compare the graphs with PyTorch: all of the LLM if memory allows and else layer by
            layer; "whole" or "layers" asks for one of the two.
        force: Whether an existing bundle may be replaced.
        revision: Branch, tag or commit, where the model is a hub id.
        trust_remote_code: Whether transformers may run code that lies beside the weights.
        chat_template: A file that takes the place of the checkpoint's chat template.
    """

    method: str | VisionPruner | LayerPruner
    ratio: float | None = None
    keep_tokens: int | None = None
    then: str | LayerPruner | None = None
    recipe: str | Path | None = None
    calibration: str | Path | None = None
    max_prune_points: int | None = None
    anyres_scope: Literal["tile", "global"] = "tile"
    segments: int | None = None
    target: str = "onnxruntime"
    dtype: Literal["fp32", "fp16"] | None = None
    verify: bool | Scope = True
    force: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | Path | None = None

    def __post_init__(self) -> None:
        check_request(self.ratio, self.keep_tokens)
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"There is no dtype {self.dtype!r}.", "Use fp32 or fp16.")
        if self.anyres_scope not in ("tile", "global"):
            raise UsageError(f"There is no scope {self.anyres_scope!r}.", "Use tile or global.")
        if self.verify not in (True, False, "whole", "layers"):
            raise UsageError(f"There is no self-check {self.verify!r}.", "Use whole or layers.")

    def methods(self) -> Methods:
        """The methods that `method` and `then` name.

        Raises:
            UsageError: They do not go together, or with the other options.
        """
        first = load_method(self.method)() if isinstance(self.method, str) else self.method
        asked = Asked(_name(self.method), self.ratio, self.keep_tokens)
        if isinstance(first, LayerPruner):
            if self.then is not None:
                raise UsageError(
                    f"{asked.name} prunes inside the LLM, so no other method can follow it.",
                    "Give the method before the LLM as --method, and the one inside it as --then.",
                )
            found = Methods(KeepAll(), Asked("none"), first, asked)
        elif self.then is None:
            found = Methods(first, asked)
        else:
            inside, inside_asked = _then(self.then)
            found = Methods(first, asked, inside, inside_asked)
        self._check(found)
        return found

    def _check(self, methods: Methods) -> None:
        if methods.inside is not None and self.segments is not None:
            raise UsageError(
                "A method inside the LLM decides itself where the decoder is cut.", "Leave --segments out."
            )
        fitting = {
            "--recipe": self.recipe,
            "--data": self.calibration,
            "--max-prune-points": self.max_prune_points,
        }
        given = [option for option, value in fitting.items() if value is not None]
        if isinstance(methods.inside, FitPrune) and methods.inside_asked is not None:
            self._check_recipe(methods.inside, methods.inside_asked, given)
        elif given:
            raise UsageError(
                f"{given[0]} belongs to fitprune.", f"Use --method fitprune, or leave {given[0]} out."
            )

    def _check_recipe(self, pruner: FitPrune, asked: Asked, given: list[str]) -> None:
        """FitPrune needs exactly one source of its scheme."""
        if asked.keep_tokens is not None:
            raise UsageError(
                "fitprune keeps another number of visual tokens at each layer.",
                "Give the fraction of visual work to keep with --ratio.",
            )
        if pruner.scheme or self.recipe is not None:
            clash = [option for option in given if option != "--recipe" or pruner.scheme]
            clash += ["--ratio" if self.then is None else "the ratio of --then"] if asked.ratio else []
            if clash:
                raise UsageError(
                    f"A recipe is fitted already, so {clash[0]} cannot change it.",
                    "Leave that out, or fit another recipe with `visprune fit`.",
                )
        elif asked.ratio is None:
            raise UsageError(
                "fitprune needs a recipe, or a ratio to fit one for.",
                "Give --recipe FILE from `visprune fit`, or "
                + ("--ratio R." if self.then is None else "write --then fitprune:R."),
            )


def _then(then: str | LayerPruner) -> tuple[LayerPruner, Asked]:
    """The second method, which must prune inside the LLM."""
    ratio = None
    if isinstance(then, str):
        name, colon, text = then.partition(":")
        if colon:
            try:
                ratio = float(text)
            except ValueError:
                raise UsageError(f"--then {then} has no ratio.", "Write it like fastv:0.5.") from None
            check_ratio(ratio)
        pruner = load_method(name)()
    else:
        pruner, name = then, _name(then)
    if not isinstance(pruner, LayerPruner):
        raise UsageError(
            f"{name} prunes before the LLM, as --method does; two methods of one place cannot be combined.",
            "Give a method inside the LLM as --then (see `visprune methods`).",
        )
    return pruner, Asked(name, ratio)


def _name(method: str | VisionPruner | LayerPruner) -> str:
    return method if isinstance(method, str) else method_name(type(method))
