"""The options of an export, and the pruning methods that they name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from visprune.budget import check_ratio, check_request
from visprune.errors import UsageError
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.fitprune.fit_options import FitOptions, FitSamples, MaxPrunePoints
from visprune.options import Option, documented
from visprune.pruning.base import LayerPruner, VisionPruner
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.keep_all import KeepAll
from visprune.pruning.published import open_recipe
from visprune.pruning.registry import load_method, method_name
from visprune.targets import DTYPES, TARGETS

__all__ = ["ExportOptions", "MethodRequest", "Methods"]


@dataclass(frozen=True, slots=True)
class MethodRequest:
    """One method and the budget that was asked for: a ratio, a number of tokens, or neither."""

    name: str
    ratio: float | None = None
    keep_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Methods:
    """The method before the LLM, and the one inside it if there is one, each with its request."""

    before: VisionPruner
    before_asked: MethodRequest
    inside: LayerPruner | None = None
    inside_asked: MethodRequest | None = None


@documented
@dataclass(frozen=True, slots=True)
class ExportOptions(CheckpointOptions):
    """Options of an export, checked as far as that is possible without the model.

    `method` and `then` may also be instances of a method, which have its own settings. The ratio of `then`
    counts what the first method left. `verify` is True for a comparison of the whole LLM if memory allows it,
    and else of its layers one by one; "whole" or "layers" asks for one of the two, False for none.

    Raises:
        UsageError: A value that makes no sense.
    """

    method: Annotated[
        str | VisionPruner | LayerPruner,
        Option("Pruning method, see `visprune methods`.", metavar="NAME", flags=("--method", "-m")),
    ]
    ratio: Annotated[
        float | None,
        Option(
            "Fraction to KEEP, in (0, 1]: of the visual tokens, or of the visual work for fitprune.",
            shows="1.0, or the method's own",
        ),
    ] = None
    keep_tokens: Annotated[int | None, Option("Visual tokens to keep of one image, instead.")] = None
    then: Annotated[
        str | LayerPruner | None,
        Option("A method inside the LLM after one before it: fastv:0.5.", metavar="NAME[:RATIO]"),
    ] = None
    recipe: Annotated[
        str | Path | None,
        Option(
            "For fitprune: what `visprune fit` wrote, or published:NAME, see `visprune methods --recipes`.",
            metavar="FILE",
        ),
    ] = None
    calibration: FitSamples = None
    max_prune_points: MaxPrunePoints = None
    anyres_scope: Annotated[
        Literal["tile", "global"],
        Option("Where a picture is several tiles: keep as many of each tile, or global.", metavar="SCOPE"),
    ] = "tile"
    segments: Annotated[
        int | None, Option("Cut the decoder into N files, with nothing pruned inside.", metavar="N")
    ] = None
    target: Annotated[str, Option(f"Platform: {', '.join(TARGETS)}.", metavar="NAME")] = "onnxruntime"
    dtype: Annotated[Literal["fp32", "fp16"] | None, Option("fp32 or fp16.", shows="the target's own")] = None
    verify: Annotated[
        bool | Literal["whole", "layers"],
        Option(
            "Compare the LLM with PyTorch as a whole, or layer by layer.",
            metavar="whole|layers",
            shows="whole if memory allows",
            off="Compare nothing with PyTorch.",
        ),
    ] = True
    force: Annotated[bool, Option("Replace an existing bundle.")] = False

    def __post_init__(self) -> None:
        CheckpointOptions.__post_init__(self)  # `super()` does not work in a dataclass with slots
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
        """Return the methods that `method` and `then` name.

        Raises:
            UsageError: A name is unknown, or the methods do not fit together or do not fit another option.
        """
        first = load_method(self.method)() if isinstance(self.method, str) else self.method
        asked = MethodRequest(_name(self.method), self.ratio, self.keep_tokens)
        if isinstance(first, LayerPruner):
            if self.then is not None:
                raise UsageError(
                    f"{asked.name} prunes inside the LLM, so no other method can follow it.",
                    "Give the method before the LLM as --method, and the one inside it as --then.",
                )
            found = Methods(KeepAll(), MethodRequest("none"), first, asked)
        elif self.then is None:
            found = Methods(first, asked)
        else:
            inside, inside_asked = _then(self.then)
            found = Methods(first, asked, inside, inside_asked)
        self._check(found)
        return found

    def needs_fit(self, methods: Methods) -> bool:
        """Return whether a recipe must be fitted, because fitprune has no deletions yet."""
        return isinstance(methods.inside, FitPrune) and not methods.inside.scheme and self.recipe is None

    def fit_options(self, asked: MethodRequest) -> FitOptions:
        """Return the options of the fit that this export needs for fitprune."""
        return FitOptions(
            ratio=1.0 if asked.ratio is None else asked.ratio,  # `methods` refuses None
            data=self.calibration,
            max_prune_points=self.max_prune_points,
            **{field.name: getattr(self, field.name) for field in fields(CheckpointOptions)},
        )

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

    def _check_recipe(self, pruner: FitPrune, asked: MethodRequest, given: list[str]) -> None:
        """Check that fitprune gets its deletions from exactly one source: a recipe, or a ratio to fit for."""
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
                    f"A recipe that exists is fitted already, so {clash[0]} cannot change it.",
                    f"Leave {clash[0]} out, or fit another recipe: "
                    "visprune fit MODEL --ratio R --max-prune-points G.",
                )
            if self.recipe is not None:
                open_recipe(self.recipe)  # refused before a model is looked for
        elif asked.ratio is None:
            raise UsageError(
                "fitprune needs a recipe, or a ratio to fit one for.",
                "Give --recipe FILE from `visprune fit`, --recipe published:NAME, or "
                + ("--ratio R." if self.then is None else "write --then fitprune:R."),
            )


def _then(then: str | LayerPruner) -> tuple[LayerPruner, MethodRequest]:
    """Return the method that `then` names, which must prune inside the LLM, and its request."""
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
    return pruner, MethodRequest(name, ratio)


def _name(method: str | VisionPruner | LayerPruner) -> str:
    return method if isinstance(method, str) else method_name(type(method))
