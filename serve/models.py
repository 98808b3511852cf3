"""Names of the models that the server answers for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visprune.errors import UsageError

__all__ = ["ServedModel", "model_ids"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A bundle under the name that requests call it by.

    Attributes:
        id: Name in the field `model` of a request.
        path: Directory of the bundle.
    """

    id: str
    path: Path


def model_ids(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a different name for each bundle, in the order of the paths.

    The name is that of the directory. Where it is taken already, a number follows, as in "model-2".

    Raises:
        UsageError: The same directory is given twice. Its weights would take the memory twice.
    """
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise UsageError(f"The bundle {paths[place]} is given twice.", "Give every bundle once.")
    ids: list[str] = []
    for path in resolved:
        name = path.name or "model"
        numbered = (f"{name}-{number}" for number in range(2, len(paths) + 2))
        ids.append(name if name not in ids else next(other for other in numbered if other not in ids))
    return tuple(ids)
