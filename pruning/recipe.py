"""FitPrune recipes: how many visual tokens each layer deletes, and how that was found (arXiv 2409.10197).

A recipe is a small JSON file that `visprune fit` writes and `visprune export` reads. It is bound to the
weights that it was fitted on: another model attends to other tokens, so the numbers would mean nothing there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard

from visprune.errors import BundleError, UsageError
from visprune.outputs import check_file, write_file
from visprune.pruning.fitprune import FitPrune
from visprune.records import from_json
from visprune.work import LayerWork

__all__ = [
    "CONVENTION",
    "SCHEMA_VERSION",
    "Fit",
    "Recipe",
    "check_output",
    "read_json",
    "read_recipe",
    "scheme_ratio",
    "write_recipe",
]

SCHEMA_VERSION = 1
CONVENTION: Final = "F3, MAC, visual tokens only"
"""How all work in a recipe is counted; see `visprune.work`."""

_REFIT = "Fit another recipe with `visprune fit`."


@dataclass(frozen=True, slots=True)
class Fit:
    """Result of a search; fields as in `Recipe`."""

    scheme: tuple[int, ...]
    alpha: float
    ratio_on_samples: float
    ratio_reached: float
    lost_self: tuple[float, ...]
    lost_cross: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A fitted scheme of deletions, and the model and samples that it was fitted on.

    Attributes:
        schema_version: Version of this record.
        method: The method that uses the recipe.
        model: Name of the model.
        weights_sha256: SHA-256 of the model's weights.
        num_layers: L, layers of the decoder.
        hidden_size: d, its hidden size.
        intermediate_size: m, the size of its MLPs.
        visual_tokens: N, visual tokens of every sample.
        scheme: Visual tokens deleted in each layer, after its attention and before its MLP.
        alpha: Share of attention that a deletion may cost a layer, as the search found it.
        convention: How work is counted.
        ratio: Fraction of the visual work to keep, as asked for.
        ratio_on_samples: Fraction that the search compared with `ratio`; there, each sample deletes its own
            count.
        ratio_reached: Fraction that the scheme keeps. Counts are rounded down, so it is a little more.
        samples: Number of samples.
        seed: Seed with which the samples were drawn.
        max_prune_points: The most layers that may delete; None if there was no limit.
        lost_self: For each layer, the share of the visual tokens' attention that is lost, mean over the
            samples. Layers after a deletion may lose more than alpha, or gain.
        lost_cross: The same for the attention of the text after the image.
        unconstrained: Result of the search without `max_prune_points`.

    Raises:
        UsageError: The fields contradict each other.
    """

    schema_version: int
    method: Literal["fitprune"]
    model: str
    weights_sha256: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    visual_tokens: int
    scheme: tuple[int, ...]
    alpha: float
    convention: Literal["F3, MAC, visual tokens only"]
    ratio: float
    ratio_on_samples: float
    ratio_reached: float
    samples: int
    seed: int
    max_prune_points: int | None
    lost_self: tuple[float, ...]
    lost_cross: tuple[float, ...]
    unconstrained: Fit | None = None

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.hidden_size, self.intermediate_size, self.visual_tokens, self.samples)
        if self.schema_version != SCHEMA_VERSION or min(sizes) < 1:
            raise UsageError("A size of the recipe is below 1, or its version is unknown.", _REFIT)
        for fit in (self, self.unconstrained):
            if fit is not None:
                self._check_fit(fit)
        if self.max_prune_points is not None and not (
            self.max_prune_points >= 1 and len(self.prune_points) <= self.max_prune_points
        ):
            raise UsageError(
                f"The scheme deletes at {len(self.prune_points)} layers, and max_prune_points is "
                f"{self.max_prune_points}.",
                _REFIT,
            )

    def _check_fit(self, fit: Recipe | Fit) -> None:
        if {len(fit.scheme), len(fit.lost_self), len(fit.lost_cross)} != {self.num_layers}:
            raise UsageError(
                f"The scheme has {len(fit.scheme)} layers and the lost mass {len(fit.lost_self)} and "
                f"{len(fit.lost_cross)}, and the model has {self.num_layers}.",
                _REFIT,
            )
        if min(fit.scheme) < 0:
            raise UsageError(f"The scheme deletes {min(fit.scheme)} tokens at a layer.", _REFIT)
        if sum(fit.scheme) >= self.visual_tokens:
            raise UsageError(
                f"The scheme deletes {sum(fit.scheme)} of {self.visual_tokens} visual tokens, and one at "
                "least must be left.",
                _REFIT,
            )
        fractions = (self.ratio, fit.alpha, fit.ratio_on_samples, fit.ratio_reached)
        if not all(0.0 < fraction <= 1.0 for fraction in fractions):  # also refuses NaN
            raise UsageError("A ratio or alpha is outside (0, 1].", _REFIT)
        if not all(math.isfinite(lost) for lost in (*fit.lost_self, *fit.lost_cross)):
            raise UsageError("The lost mass of a layer is no finite number.", _REFIT)

    @property
    def prune_points(self) -> tuple[int, ...]:
        """The layers that delete tokens."""
        return tuple(layer for layer, count in enumerate(self.scheme) if count)

    @property
    def work(self) -> LayerWork:
        """Work of one layer."""
        return LayerWork(self.hidden_size, self.intermediate_size)

    def true_ratio(self) -> float:
        """Compute the fraction of the visual work that the scheme keeps."""
        return scheme_ratio(self.scheme, self.visual_tokens, self.work)

    def exported_ratio(self, scheme: tuple[int, ...]) -> float:
        """Compute the fraction that a scheme keeps as exported: without deletions at the last layer."""
        return scheme_ratio((*scheme[:-1], 0), self.visual_tokens, self.work)

    def pruner(self) -> FitPrune:
        """Return the method that deletes what the recipe says."""
        return FitPrune(self.scheme, self.visual_tokens, self.exported_ratio(self.scheme))

    def check_layers(self, num_layers: int, name: str, adapters: Sequence[str] = ()) -> None:
        """Refuse a decoder with another number of layers; arguments and error as of `check_model`."""
        if num_layers != self.num_layers:
            raise UsageError(
                f"The recipe is for the {self.num_layers} layers of {self.model}, and {name} has "
                f"{num_layers}.",
                f"Fit one for this model: {self._fit_command(adapters)}",
            )

    def check_model(
        self, *, weights_sha256: str, num_layers: int, name: str, adapters: Sequence[str] = ()
    ) -> None:
        """Refuse the recipe for any model except its own.

        Args:
            weights_sha256: SHA-256 of the model's weights, as `Checkpoint.weights_sha256` gives it.
            num_layers: Layers of the model's decoder.
            name: Name of the model, for messages.
            adapters: The adapters that were given with it, for messages.

        Raises:
            UsageError: The recipe was fitted on another model.
        """
        self.check_layers(num_layers, name, adapters)
        if weights_sha256 != self.weights_sha256:
            merged = f" with {' and '.join(adapters)} merged" if adapters else ""
            fit = self._fit_command(adapters)
            hint = f"Fit one for this model: {fit}"
            if self.model == name and not adapters:
                hint = f"If it was fitted with an adapter, give that with --adapter; else fit another: {fit}"
            raise UsageError(
                f"The recipe was fitted on other weights (of {self.model}) than those of {name}{merged}.",
                hint,
            )

    def _fit_command(self, adapters: Sequence[str]) -> str:
        options = "".join(f" --adapter {adapter}" for adapter in adapters)
        return f"visprune fit MODEL{options} --ratio {self.ratio:g}"

    def to_json(self) -> str:
        """Return the text of the recipe's file."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


def scheme_ratio(scheme: tuple[int, ...], visual_tokens: int, work: LayerWork) -> float:
    """Compute the fraction of the visual work that a scheme keeps."""
    left, spent = visual_tokens, 0
    for count in scheme:
        spent += work.before_deletion(left) + work.after_deletion(left - count)
        left -= count
    return spent / (len(scheme) * work.layer(visual_tokens))


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a fitted recipe.

    Raises:
        UsageError: The file cannot be read.
        BundleError: It is no recipe, its fields contradict each other, or a newer visprune wrote it.
    """
    return from_json(Recipe, read_json(path), str(path))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the file of a recipe, fitted or published, whose fields are not checked yet.

    Raises:
        UsageError: The file cannot be read.
        BundleError: It is no recipe, or a newer visprune wrote it.
    """
    path = Path(path)
    hint = "Give a file that `visprune fit` wrote."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read: {error.strerror}.", hint) from None
    except (ValueError, RecursionError):
        raise BundleError(f"The recipe {path} is not JSON.", hint) from None
    if not _is_recipe(data):
        raise BundleError(f"{path} is not a recipe.", hint)
    version = data["schema_version"]
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, and this visprune reads {SCHEMA_VERSION}.",
            "Install a newer visprune, or fit again with this one.",
        )
    return data


def check_output(path: Path, *, force: bool) -> None:
    """Refuse a path that a recipe cannot be written to, before any work is done.

    Args:
        path: The file.
        force: Whether an earlier recipe may be replaced.

    Raises:
        UsageError: The file exists and may not be replaced, or its directory is missing or not writable.
    """
    check_file(path, force=force)
    if path.exists() and not _holds_recipe(path):
        raise UsageError(
            f"{path} exists and is not a recipe, so --force will not replace it.",
            "Choose another file with -o.",
        )


def write_recipe(recipe: Recipe, path: str | Path, *, force: bool = False) -> None:
    """Write a recipe, whole or not at all.

    Args:
        recipe: The recipe.
        path: The file.
        force: Whether an earlier recipe may be replaced.

    Raises:
        UsageError: As `check_output`.
    """
    path = Path(path)
    check_output(path, force=force)
    write_file(path, recipe.to_json())


def _is_recipe(data: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(data, dict) and data.get("method") == "fitprune" and "schema_version" in data


def _holds_recipe(path: Path) -> bool:
    try:
        return _is_recipe(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False
