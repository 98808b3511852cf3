"""FitPrune recipes: how many visual tokens each layer deletes, and how that was found (arXiv 2409.10197).

A recipe is a small JSON file that `visprune fit` writes and `visprune export` reads. It is bound to the
weights it was fitted on: another model attends elsewhere, so its counts would mean nothing there.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from visprune.errors import BundleError, UsageError
from visprune.records import from_json
from visprune.work import LayerWork

__all__ = [
    "CONVENTION",
    "SCHEMA_VERSION",
    "Fit",
    "Recipe",
    "check_output",
    "read_recipe",
    "scheme_ratio",
    "write_recipe",
]

SCHEMA_VERSION = 1
CONVENTION: Final = "F3, MAC, visual tokens only"
"""How all work in a recipe is counted, see `visprune.work`."""

_REFIT = "Fit another recipe with `visprune fit`."


@dataclass(frozen=True, slots=True)
class Fit:
    """What a search found; fields as in `Recipe`."""

    scheme: tuple[int, ...]
    alpha: float
    ratio_on_samples: float
    ratio_reached: float
    lost_self: tuple[float, ...]
    lost_cross: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A fitted scheme of deletions, and what it was fitted on.

    Attributes:
        schema_version: Of this record.
        method: The method that uses it.
        model: Name of the model.
        weights_sha256: Of its weights.
        num_layers: L.
        hidden_size: d.
        intermediate_size: m.
        visual_tokens: N, of every sample.
        scheme: Visual tokens deleted in each layer, after its attention and before its MLP.
        alpha: Share of attention that a deletion may cost a layer, as the search found it.
        convention: How work is counted.
        ratio: Fraction of the visual work to keep, as asked for.
        ratio_on_samples: The fraction that the search's budget test saw: each sample deletes its own count.
        ratio_reached: The fraction that the scheme keeps. Counts are rounded down, so it is a little more.
        samples: How many were fitted on.
        seed: With which they were drawn.
        max_prune_points: The most layers that may delete; None where that was left open.
        lost_self: For each layer, the share of the visual tokens' attention that is lost, mean over the
            samples. Layers that follow a deletion may lose more than alpha, or gain.
        lost_cross: The same for the attention of the text after the image.
        unconstrained: What would have been reached without `max_prune_points`.

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
        """The layers that delete."""
        return tuple(layer for layer, count in enumerate(self.scheme) if count)

    @property
    def work(self) -> LayerWork:
        """The work of one layer."""
        return LayerWork(self.hidden_size, self.intermediate_size)

    def true_ratio(self) -> float:
        """The fraction of the visual work that the scheme keeps, counted anew."""
        return scheme_ratio(self.scheme, self.visual_tokens, self.work)

    def exported_ratio(self, scheme: tuple[int, ...]) -> float:
        """The same of a scheme as exported: without a deletion at the last layer, which nothing follows."""
        return scheme_ratio((*scheme[:-1], 0), self.visual_tokens, self.work)

    def check_model(self, *, weights_sha256: str, num_layers: int, name: str) -> None:
        """Refuse the recipe for any model but its own.

        Args:
            weights_sha256: Of the model's weights, as `Checkpoint.weights_sha256` gives it.
            num_layers: Of its decoder.
            name: What to call it.

        Raises:
            UsageError: It was fitted on another model.
        """
        hint = f"Fit one for this model: visprune fit MODEL --ratio {self.ratio:g}"
        if num_layers != self.num_layers:
            raise UsageError(
                f"The recipe is for the {self.num_layers} layers of {self.model}, and {name} has "
                f"{num_layers}.",
                hint,
            )
        if weights_sha256 != self.weights_sha256:
            raise UsageError(
                f"The recipe was fitted on other weights (of {self.model}) than those of {name}.", hint
            )

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


def scheme_ratio(scheme: tuple[int, ...], visual_tokens: int, work: LayerWork) -> float:
    """The fraction of the visual work that a scheme keeps."""
    left, spent = visual_tokens, 0
    for count in scheme:
        spent += work.before_deletion(left) + work.after_deletion(left - count)
        left -= count
    return spent / (len(scheme) * work.layer(visual_tokens))


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: There is no such file.
        BundleError: It is no recipe, was altered into nonsense, or comes from a newer visprune.
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
    return from_json(Recipe, data, str(path))


def check_output(path: Path, *, force: bool) -> None:
    """Refuse a place to write a recipe to, before any work is done.

    Raises:
        UsageError: Something is there and may not be replaced, or there is no such directory.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory.", "Name a file with -o.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists.", "Choose another file with -o, or replace it with --force.")
    if path.exists() and not _holds_recipe(path):
        raise UsageError(
            f"{path} exists and is not a recipe, so --force will not replace it.",
            "Choose another file with -o.",
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"There is no directory {path.parent}.", "Create it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path.parent} cannot be written to.", "Choose another place with -o.")


def write_recipe(recipe: Recipe, path: str | Path, *, force: bool = False) -> None:
    """Write a recipe, whole or not at all.

    Args:
        recipe: What to write.
        path: The file.
        force: Whether an earlier recipe may be replaced.

    Raises:
        UsageError: `path` exists and may not be replaced.
    """
    path = Path(path)
    check_output(path, force=force)
    stage = path.with_name(f".visprune-partial-{secrets.token_hex(4)}")
    try:
        stage.write_text(recipe.to_json(), encoding="utf-8")
        stage.replace(path)
    finally:
        stage.unlink(missing_ok=True)


def _is_recipe(data: object) -> bool:
    return isinstance(data, dict) and data.get("method") == "fitprune" and "schema_version" in data


def _holds_recipe(path: Path) -> bool:
    try:
        return _is_recipe(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False
