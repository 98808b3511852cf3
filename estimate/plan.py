"""A plan: does a model fit a device, and how long does it take there at least. Always an estimate.

Not counted: reading and resizing the picture, the choice of the tokens that stay, the token table. The vision
tower and the prefill are what the first token waits for; each later token reads all weights of the LLM once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visprune.errors import UsageError
from visprune.estimate.devices import Device, check_precision
from visprune.estimate.flops import TEXT_TOKENS
from visprune.estimate.footprint import Footprint, footprint, parameters
from visprune.estimate.planned_model import Subject
from visprune.estimate.roofline import Estimate, Stage, Work, estimate, works

__all__ = ["RATIOS", "Choice", "Plan", "Prompt", "StagePlan", "best", "choices", "make_plan"]

RATIOS = (1.0, 0.75, 0.5, 0.25, 0.125)
"""What `choices` tries."""

_FAR = 8.0  # times larger or smaller than what was measured, from where rates are another matter


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: one image, text, and an answer.

    Attributes:
        text_tokens: Beside the image.
        new_tokens: Of the answer.
        size: Height and width of the image in pixels, for a model that tiles it; None: the most tiles.

    Raises:
        UsageError: A number that cannot be.
    """

    text_tokens: int = TEXT_TOKENS
    new_tokens: int = 128
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.text_tokens < 0 or self.new_tokens < 1 or (self.size and min(self.size) < 1):
            raise UsageError(
                f"There is no prompt of {self.text_tokens} text tokens and {self.new_tokens} new ones"
                f"{f' with an image of {self.size[1]} x {self.size[0]}' if self.size else ''}.",
                "Give no less than 0 text tokens, one new one, and an image of one pixel.",
            )


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage.

    Attributes:
        stage: Its name; "decode" is one token.
        work: FLOP.
        bytes: Of weights and cache.
        peak_ms: At the datasheet's peaks; None where there is no datasheet.
        expected_ms: At the shares of them that are reached.
        binds: What is waited for.
    """

    stage: Stage
    work: int
    bytes: int
    peak_ms: float | None
    expected_ms: float
    binds: str


@dataclass(frozen=True, slots=True)
class Plan:
    """An estimate, not a measurement.

    Attributes:
        model: Its name.
        device: Its name.
        title: What the device is.
        precision: Of linear layers.
        kept: Which visual tokens stay.
        prompt: What is asked.
        prompt_tokens: Visual and text tokens that enter the LLM.
        tiles: Of the picture.
        parameters: Numbers in the weights.
        memory: Bytes.
        usable: Bytes that the device has for a model; None where that is not known.
        stages: In the order they run.
        findings: What is waited for, and what would help.
        sources: Where numbers come from, and what was assumed.
    """

    model: str
    device: str
    title: str
    precision: str
    kept: str
    prompt: Prompt
    prompt_tokens: int
    tiles: int
    parameters: int
    memory: Footprint
    usable: int | None
    stages: tuple[StagePlan, ...]
    findings: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the device holds it; None where nobody knows how much it has."""
        return None if self.usable is None else self.memory.total <= self.usable

    @property
    def first_token_ms(self) -> float:
        """Expected time to the first token."""
        return sum(stage.expected_ms for stage in self.stages[:-1])

    @property
    def first_token_peak_ms(self) -> float | None:
        """The same at the datasheet's peaks; None where there is no datasheet."""
        known = [stage.peak_ms for stage in self.stages[:-1] if stage.peak_ms is not None]
        return sum(known) if len(known) == len(self.stages) - 1 else None

    @property
    def token(self) -> StagePlan:
        """One token after the first."""
        return self.stages[-1]


def make_plan(subject: Subject, device: Device, precision: str, prompt: Prompt) -> Plan:
    """Estimate a model on a device.

    Args:
        subject: Model and pruning.
        device: Where.
        precision: Of all linear layers.
        prompt: What is asked.

    Raises:
        UsageError: There is no such precision, the prompt is longer than the model takes, or it has a size of
            an image that the model does not look at.
        UnsupportedError: The device has not got this precision.
        InputError: An image that is too elongated for the model.
    """
    check_precision(device, precision)
    if prompt.size is not None and subject.tiling is None:
        raise UsageError(
            f"{subject.name} squeezes every picture into one tile, so its size changes nothing.",
            "Leave the size out.",
        )
    tokens = subject.tokens(prompt.text_tokens, prompt.size)
    if tokens.entering + prompt.new_tokens > subject.context_length:
        raise UsageError(
            f"{tokens.entering} tokens and {prompt.new_tokens} new ones are more than the "
            f"{subject.context_length} that {subject.name} takes.",
            "Keep fewer visual tokens, or ask for a shorter answer.",
        )
    stages = []
    for work in works(subject, tokens, prompt.new_tokens, precision, device.item_size):
        expected = estimate(work, device.rates[precision])
        peak = device.peaks.get(precision)
        at_peak = None if peak is None else estimate(work, peak).seconds * 1e3
        stages.append(_stage(work, at_peak, expected))
    return Plan(
        model=subject.name,
        device=device.name,
        title=device.title,
        precision=precision,
        kept=subject.kept,
        prompt=prompt,
        prompt_tokens=tokens.entering,
        tiles=tokens.tiles,
        parameters=parameters(subject),
        memory=footprint(subject, tokens, prompt.new_tokens, precision, device.item_size),
        usable=device.usable,
        stages=tuple(stages),
        findings=_findings(stages, device, precision),
        sources=device.sources,
    )


def _findings(stages: Sequence[StagePlan], device: Device, precision: str) -> tuple[str, ...]:
    vision, projector, prefill, token = stages
    share = vision.expected_ms / (vision.expected_ms + projector.expected_ms + prefill.expected_ms)
    found = [f"The vision tower is {share:.0%} of the time to the first token; pruning does not shorten it."]
    if prefill.binds == "FLOPs":
        found.append("The prefill waits for FLOPs: fewer visual tokens shorten it.")
    else:
        found.append("The prefill waits for weight bytes: fewer visual tokens gain no more; fewer bits do.")
    if token.binds == "bytes":
        found.append(
            f"A later token waits for {token.bytes / 1e9:.3g} GB of weights and cache: fewer bits help, and "
            "pruning by its share of the cache."
        )
    else:
        found.append("A later token waits for FLOPs, which is unusual: see whether the calibration fits.")
    factor = prefill.bytes / device.calibrated_bytes if device.calibrated_bytes else 1.0
    if not 1 / _FAR <= factor <= _FAR:
        found.append(
            f"This model reads {factor:.2g} times the bytes of those it was calibrated on: trust it less."
        )
    if precision in device.not_built:
        found.append(f"This version of visprune builds no {precision} engine for SM{device.sm}.")
    elif precision == "int8" and device.sm is not None:
        found.append("An int8 vision tower is often slower than fp16 on GPUs: measure before you keep it.")
    return tuple(found)


def _stage(work: Work, at_peak: float | None, expected: Estimate) -> StagePlan:
    flop = work.linear + work.attention
    return StagePlan(work.stage, flop, work.bytes, at_peak, expected.seconds * 1e3, expected.binds)


@dataclass(frozen=True, slots=True)
class Choice:
    """One ratio in one precision.

    Attributes:
        ratio: Asked for; None where there is only one: a recipe fixes it, or nothing is pruned.
        precision: Of linear layers.
        prompt_tokens: That enter the LLM.
        first_token_ms: Expected.
        token_ms: Expected of each later token.
        bytes: Of memory.
        fits: As in `Plan`.
        reached: Whether it fits, as far as is known, and the first token comes in time.
    """

    ratio: float | None
    precision: str
    prompt_tokens: int
    first_token_ms: float
    token_ms: float
    bytes: int
    fits: bool | None
    reached: bool


def choices(subject: Subject, device: Device, prompt: Prompt, ttft_ms: float) -> tuple[Choice, ...]:
    """Every ratio in every precision of a device, most tokens and most exact first.

    Args:
        subject: Model and pruning.
        device: Where.
        prompt: What is asked.
        ttft_ms: The wanted time to the first token.

    Raises:
        UsageError: The time is not positive, or as `make_plan`.
    """
    if not ttft_ms > 0:
        raise UsageError(f"No first token comes in {ttft_ms:g} ms.", "Give a time above 0.")
    found = []
    for ratio in RATIOS if subject.takes_ratios else (None,):
        chosen = subject if ratio is None else subject.at(ratio)
        for precision in device.precisions:
            plan = make_plan(chosen, device, precision, prompt)
            first, fits = plan.first_token_ms, plan.fits
            reached = first <= ttft_ms and fits is not False
            token, total = plan.token.expected_ms, plan.memory.total
            found.append(Choice(ratio, precision, plan.prompt_tokens, first, token, total, fits, reached))
    return tuple(found)


def best(found: tuple[Choice, ...]) -> Choice | None:
    """The first that reaches the time: most tokens, then the most exact precision."""
    return next((choice for choice in found if choice.reached), None)
