"""Choice of the optimisation profile that fits an engine's inputs, and the error if none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from visprune.errors import InputError
from visprune.manifest import EngineProfile, Graph

__all__ = ["choose_profile"]

_BUILD = "or build engines with a larger {} (visprune-build)."
_DIMENSIONS = {
    "S": ("new tokens", f"Shorten the prompt, keep fewer visual tokens, {_BUILD.format('--max-prompt')}"),
    "P": ("tokens in the cache", f"Start a new conversation, {_BUILD.format('--max-cache')}"),
    "M": (
        "visual tokens of new pictures",
        f"Give fewer pictures at once, keep fewer visual tokens, {_BUILD.format('--max-images')}",
    ),
    "T": ("tiles of a picture", "Give a smaller picture, or fewer frames of a video."),
}
"""By the letter of a dimension: what it counts, and a hint for when it is too large."""

_OTHER = ("", f"Keep fewer visual tokens, {_BUILD.format('--max-prompt')}")


def choose_profile(
    profiles: Sequence[EngineProfile], graph: str, interface: Graph, fed: Mapping[str, Sequence[int]]
) -> int:
    """Choose the first profile that the inputs fit, profiles for decoding before the others.

    Args:
        profiles: Profiles of an engine, in the engine's order.
        graph: Name of the engine's graph.
        interface: The graph in the manifest.
        fed: For each input its shape; for an input that is a count, its value.

    Returns:
        Index of the profile; 0 for an engine without profiles, whose inputs do not vary.

    Raises:
        InputError: The inputs fit no profile.
    """
    if not profiles:
        return 0
    order = sorted(range(len(profiles)), key=lambda index: profiles[index].name != "decode")
    for index in order:
        if not _outside(profiles[index], fed):
            return index
    widest = profiles[order[-1]]
    name, place = _outside(widest, fed)[0]
    shape = next(spec.shape for spec in interface.inputs if spec.name == name)
    ranges, found = widest.inputs[name], fed[name][place]
    what, hint = _DIMENSIONS.get(str(shape[place]) if shape else "", _OTHER)
    what = what or name
    if found > ranges.most[place]:
        raise InputError(
            f"The engine of {graph} takes at most {ranges.most[place]} {what}, and this has {found}.", hint
        )
    raise InputError(
        f"The engine of {graph} takes at least {ranges.least[place]} {what}, and this has {found}.",
        "Build engines of this bundle again (visprune-build).",
    )


def _outside(profile: EngineProfile, fed: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    """Return the inputs that do not fit a profile, each with the index of the dimension."""
    return [
        (name, place)
        for name, ranges in profile.inputs.items()
        for place, found in enumerate(fed[name])
        if not ranges.least[place] <= found <= ranges.most[place]
    ]
