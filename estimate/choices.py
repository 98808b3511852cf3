"""Choices of ratio and precision for a wanted time to the first token."""

from __future__ import annotations

from dataclasses import dataclass

from visprune.errors import UsageError
from visprune.estimate.devices import PlannedDevice
from visprune.estimate.plan import PlannedPrompt, make_plan
from visprune.estimate.planned_model import PrunedModel

__all__ = ["RATIOS", "Choice", "best", "choices"]

RATIOS = (1.0, 0.75, 0.5, 0.25, 0.125)
"""Ratios that `choices` tries, for a method that takes ratios."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One ratio in one precision, and what it costs.

    Attributes:
        ratio: Fraction of tokens kept; None where there is no choice, because a recipe fixes it or nothing is
            pruned.
        precision: Precision of linear layers.
        prompt_tokens: Tokens that enter the LLM.
        first_token_ms: Expected time to the first token.
        token_ms: Expected time of each later token.
        bytes: Bytes of memory.
        fits: Whether it fits the memory of the device, as in `Plan`.
        reached: Whether the first token comes in time, and the model is not known to be too large.
    """

    ratio: float | None
    precision: str
    prompt_tokens: int
    first_token_ms: float
    token_ms: float
    bytes: int
    fits: bool | None
    reached: bool


def choices(
    model: PrunedModel, device: PlannedDevice, prompt: PlannedPrompt, ttft_ms: float
) -> tuple[Choice, ...]:
    """Plan every ratio in every precision of a device, the most tokens and the most exact precision first.

    Args:
        model: The model with its pruning.
        device: The device that it shall run on.
        prompt: Prompt and answer to plan for.
        ttft_ms: The wanted time to the first token.

    Raises:
        UsageError: The time is not positive, or as `make_plan`.
    """
    if not ttft_ms > 0:
        raise UsageError(f"No first token comes in {ttft_ms:g} ms.", "Give a time above 0.")
    found = []
    for ratio in RATIOS if model.takes_ratios else (None,):
        chosen = model if ratio is None else model.at(ratio)
        for precision in device.precisions:
            plan = make_plan(chosen, device, precision, prompt)
            first, fits = plan.first_token_ms, plan.fits
            reached = first <= ttft_ms and fits is not False
            token, total = plan.token.expected_ms, plan.memory.total
            found.append(Choice(ratio, precision, plan.prompt_tokens, first, token, total, fits, reached))
    return tuple(found)


def best(found: tuple[Choice, ...]) -> Choice | None:
    """Return the first choice that reaches the time: the most tokens, then the most exact precision."""
    return next((choice for choice in found if choice.reached), None)
