"""Which profile of an engine takes what it is fed, and what to do where none does."""

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
"""By the letter of a dimension: what it counts, and what to do where it is too large."""

_OTHER = ("", f"Keep fewer visual tokens, {_BUILD.format('--max-prompt')}")


def choose_profile(
    profiles: Sequence[EngineProfile], graph: str, interface: Graph, fed: Mapping[str, Sequence[int]]
) -> int:
    """The first profile for decoding that takes this, else the first of the others.

    Args:
        profiles: Of an engine, in its order.
        graph: Its graph's name.
        interface: That graph.
        fed: By input its shape, or the value of one that is a count.

    Returns:
        Its index; 0 where nothing varies, and there is no profile.

    Raises:
        InputError: None takes this.
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
    """The inputs that do not fit, and at which place."""
    return [
        (name, place)
        for name, ranges in profile.inputs.items()
        for place, found in enumerate(fed[name])
        if not ranges.least[place] <= found <= ranges.most[place]
    ]
