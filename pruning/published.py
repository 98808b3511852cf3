"""FitPrune's published recipes, found by name, and the reading of a recipe of either kind.

Source: the public recipes of the authors of FitPrune (arXiv 2409.10197), as numbers in
`published_recipes.json`. They were fitted on LLaVA models of 7 B parameters, whose decoders have 32 layers. A
name such as `llava-1.5-7b-60` ends with the nominal reduction: the percentage of the visual work that the
authors say the recipe removes. The true reduction follows from the deletions; some recipes fall short.

The weights that such a recipe was fitted on are not known here, so it is refused by the number of layers
alone. `PublishedRecipe.note` says on which model it was fitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

from visprune.errors import BundleError, UsageError
from visprune.names import lookup
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.recipe import Recipe, read_json, scheme_ratio
from visprune.records import from_json
from visprune.work import LayerWork

__all__ = ["PublishedRecipe", "open_recipe", "published_recipes"]

_PREFIX: Final = "published:"
_LIST = "`visprune methods --recipes` lists them"
_FAR = 0.02  # a reduction that misses its name by more is worth a sentence


@dataclass(frozen=True, slots=True)
class PublishedRecipe:
    """A scheme of deletions that the authors of FitPrune published (arXiv 2409.10197).

    Attributes:
        schema_version: Version of this record.
        method: The method that uses the recipe.
        published: Its name.
        model: The model that it was fitted on.
        source: Where it was published.
        num_layers: L, layers of that model's decoder.
        hidden_size: d, its hidden size.
        intermediate_size: m, the size of its MLPs.
        visual_tokens: N, the visual tokens that the scheme is made for.
        nominal_reduction: Fraction of the visual work that the recipe is said to remove.
        scheme: Visual tokens deleted in each layer, after its attention and before its MLP.
        convention: How work is counted.

    Raises:
        UsageError: The scheme does not fit the layers or the tokens.
    """

    schema_version: int
    method: Literal["fitprune"]
    published: str
    model: str
    source: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    visual_tokens: int
    nominal_reduction: float
    scheme: tuple[int, ...]
    convention: Literal["F3, MAC, visual tokens only"]

    def __post_init__(self) -> None:
        if len(self.scheme) != self.num_layers or min(self.scheme, default=-1) < 0:
            raise UsageError(
                f"The scheme has {len(self.scheme)} counts for {self.num_layers} layers, or one below 0.",
                "Give one count for each layer, of at least 0.",
            )
        if sum(self.scheme) >= self.visual_tokens:
            raise UsageError(
                f"The scheme deletes {sum(self.scheme)} of {self.visual_tokens} visual tokens.",
                "Leave one token.",
            )

    @property
    def option(self) -> str:
        """The recipe as `--recipe` takes it."""
        return f"{_PREFIX}{self.published}"

    @property
    def prune_points(self) -> tuple[int, ...]:
        """The layers that delete tokens."""
        return tuple(layer for layer, count in enumerate(self.scheme) if count)

    @property
    def true_reduction(self) -> float:
        """Fraction of the visual work that the scheme removes."""
        work = LayerWork(self.hidden_size, self.intermediate_size)
        return 1 - scheme_ratio(self.scheme, self.visual_tokens, work)

    @property
    def shortfall(self) -> str | None:
        """A sentence, if the true reduction is more than 2 percentage points below the nominal one."""
        if self.nominal_reduction - self.true_reduction <= _FAR:
            return None
        return (
            f"It removes {self.true_reduction:.1%} of the visual work, and not the "
            f"{self.nominal_reduction:.0%} of its name."
        )

    def pruner(self) -> FitPrune:
        """Return the method that deletes what the recipe says."""
        return FitPrune(self.scheme, self.visual_tokens, 1 - self.true_reduction, self.option, self.source)

    def check_layers(self, num_layers: int, name: str) -> None:
        """Refuse a decoder with another number of layers.

        Args:
            num_layers: Layers of the decoder.
            name: Name of the model, for messages.

        Raises:
            UsageError: The recipe has another number of layers.
        """
        if num_layers != self.num_layers:
            raise UsageError(
                f"The recipe {self.option} is for the {self.num_layers} layers of {self.model}, and {name} "
                f"has {num_layers}.",
                f"Fit one for this model: visprune fit MODEL --ratio {1 - self.nominal_reduction:.2g}",
            )

    def note(self, name: str, tokens: int | None) -> str:
        """Return what a user of the recipe should know.

        Args:
            name: Name of the model that the recipe is used on.
            tokens: Visual tokens of one image that enter the LLM; None if their number depends on the image.
        """
        said = (
            f"The recipe {self.option} was fitted on {self.model} by the authors of FitPrune. Whether {name} "
            "has the same weights cannot be known, so measure its accuracy."
        )
        if tokens != self.visual_tokens:
            given = "those of each prompt" if tokens is None else f"the {tokens} that enter the decoder here"
            said += f" Its counts are for {self.visual_tokens} visual tokens and are scaled to {given}."
        if self.shortfall is not None:
            said += f" {self.shortfall}"
        return said

    def to_json(self) -> str:
        """Return the text of the file that a bundle has of it."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class _Model:
    """The recipes for one model; fields as in `PublishedRecipe`.

    `schemes` has the nominal reduction in percent as keys.
    """

    name: str
    model: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    visual_tokens: int
    schemes: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Table:
    """The file of published recipes; fields as in `PublishedRecipe`."""

    schema_version: int
    method: Literal["fitprune"]
    source: str
    convention: Literal["F3, MAC, visual tokens only"]
    models: tuple[_Model, ...]


@cache
def published_recipes() -> Mapping[str, PublishedRecipe]:
    """Return the published recipes by name, in the order of models and reductions."""
    file = Path(__file__).with_name("published_recipes.json")
    table = from_json(_Table, json.loads(file.read_text(encoding="utf-8")), file.name)
    recipes = [
        PublishedRecipe(
            schema_version=table.schema_version,
            method=table.method,
            published=f"{one.name}-{percent}",
            model=one.model,
            source=table.source,
            num_layers=one.num_layers,
            hidden_size=one.hidden_size,
            intermediate_size=one.intermediate_size,
            visual_tokens=one.visual_tokens,
            nominal_reduction=int(percent) / 100,
            scheme=scheme,
            convention=table.convention,
        )
        for one in table.models
        for percent, scheme in one.schemes.items()
    ]
    return {recipe.published: recipe for recipe in recipes}


def open_recipe(given: str | Path) -> Recipe | PublishedRecipe:
    """Return the recipe of a file, or the published recipe of a name.

    Args:
        given: A file that `visprune fit` wrote, the `recipe.json` of a bundle, or `published:NAME`. A file
            whose name begins with `published:` is given by its full path.

    Raises:
        UsageError: There is no published recipe of this name, or the file cannot be read.
        BundleError: The file is no recipe, or says that it is a published one and differs from it.
    """
    text, known = str(given), published_recipes()
    if text == _PREFIX:
        raise UsageError(f"{_PREFIX} names no recipe.", f"Write {_PREFIX}NAME; {_LIST}.")
    if text.startswith(_PREFIX):
        return lookup(text.removeprefix(_PREFIX), known, "published recipe")
    if text in known and not Path(text).exists():
        raise UsageError(f"There is no file {text}.", f"Write {_PREFIX}{text} for the published recipe.")
    data = read_json(text)
    if "published" not in data:
        return from_json(Recipe, data, text)
    found = from_json(PublishedRecipe, data, text)
    if known.get(found.published) != found:
        raise BundleError(
            f"{text} says that it is the published recipe {found.published}, and it is not.",
            f"Give the name, as {_PREFIX}NAME ({_LIST}), or a file that `visprune fit` wrote.",
        )
    return found
