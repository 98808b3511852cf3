"""A plan: whether a model fits a device, and the least time that it takes there. Always an estimate.

The time to the first token is that of the vision tower, the projector and the prefill. Each later token reads
all weights of the LLM once. Not counted: reading and resizing the picture, the selection of tokens, and the
look-up in the token table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visprune.errors import UsageError
from visprune.estimate.devices import PlannedDevice, check_precision
from visprune.estimate.flops import TEXT_TOKENS
from visprune.estimate.footprint import Footprint, footprint, parameters
from visprune.estimate.planned_model import PrunedModel
from visprune.estimate.roofline import Binds, Estimate, Stage, StageWork, estimate, stage_works

__all__ = ["Plan", "PlannedPrompt", "StagePlan", "make_plan"]

_FAR = 8.0  # where a model reads this many times more or fewer bytes than the calibration, rates may differ


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt of one image and text, and the length of its answer.

    Attributes:
        text_tokens: Text tokens of the prompt.
        new_tokens: Tokens of the answer.
        size: Height and width of the image in pixels, for a model that tiles it; if None, the size that makes
            the most tiles.

    Raises:
        UsageError: A number is too small.
    """

    text_tokens: int = TEXT_TOKENS
    new_tokens: int = 128
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.text_tokens < 0 or self.new_tokens < 1 or (self.size and min(self.size) < 1):
            raise UsageError(
                f"There is no prompt of {self.text_tokens} text tokens and {self.new_tokens} new ones"
                f"{f' with an image of {self.size[1]} x {self.size[0]}' if self.size else ''}.",
                "Give at least 0 text tokens, one new token, and an image of one pixel.",
            )


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Estimate of one stage.

    Attributes:
        stage: Name of the stage; "decode" is one token.
        work: FLOP.
        bytes: Bytes of weights and cache that it moves.
        peak_ms: Time at the datasheet's peak rates; None where there is no datasheet.
        expected_ms: Time at the expected rates.
        binds: What limits the expected time: "FLOPs" (compute-bound) or "bytes" (memory-bound).
    """

    stage: Stage
    work: int
    bytes: int
    peak_ms: float | None
    expected_ms: float
    binds: Binds


@dataclass(frozen=True, slots=True)
class Plan:
    """Estimated memory and latency of a model on a device; nothing of it is measured.

    Attributes:
        model: Name of the model.
        device: Name of the device.
        title: The maker's name of the device.
        precision: Precision of linear layers.
        kept: The sentence about kept tokens.
        prompt: Prompt and answer that the plan is for.
        prompt_tokens: Visual and text tokens that enter the LLM.
        tiles: Tiles of the picture.
        parameters: Numbers in the weights.
        memory: Bytes of each part.
        usable: Bytes that the device has for a model; None where that is not known.
        stages: The stages in the order they run.
        findings: Sentences that say what limits each stage, and what would help.
        sources: Sentences that say where the numbers come from, and what is assumed.
    """

    model: str
    device: str
    title: str
    precision: str
    kept: str
    prompt: PlannedPrompt
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
        """Whether the model fits the memory of the device; None where its size is not known."""
        return None if self.usable is None else self.memory.total <= self.usable

    @property
    def first_token_ms(self) -> float:
        """Expected time to the first token."""
        return sum(stage.expected_ms for stage in self.stages[:-1])

    @property
    def first_token_peak_ms(self) -> float | None:
        """Time to the first token at the datasheet's peak rates; None where there is no datasheet."""
        known = [stage.peak_ms for stage in self.stages[:-1] if stage.peak_ms is not None]
        return sum(known) if len(known) == len(self.stages) - 1 else None

    @property
    def token(self) -> StagePlan:
        """Estimate of one token after the first."""
        return self.stages[-1]


def make_plan(model: PrunedModel, device: PlannedDevice, precision: str, prompt: PlannedPrompt) -> Plan:
    """Estimate the memory and latency of a model on a device.

    Args:
        model: The model with its pruning.
        device: The device that it shall run on.
        precision: Precision of all linear layers.
        prompt: Prompt and answer to plan for.

    Raises:
        UsageError: There is no such precision, the prompt is longer than the model takes, or it has the size
            of an image for a model that does not tile images.
        UnsupportedError: The device cannot be planned in this precision.
        InputError: The image is too elongated for the model.
    """
    check_precision(device, precision)
    sizes = model.sizes
    if prompt.size is not None and model.tiling is None:
        raise UsageError(
            f"{sizes.name} squeezes every picture into one tile, so its size changes nothing.",
            "Leave the size out.",
        )
    tokens = model.tokens(prompt.text_tokens, prompt.size)
    if tokens.entering + prompt.new_tokens > sizes.context_length:
        raise UsageError(
            f"{tokens.entering} tokens and {prompt.new_tokens} new ones are more than the "
            f"{sizes.context_length} that {sizes.name} takes.",
            "Keep fewer visual tokens, or ask for a shorter answer.",
        )
    stages = []
    for work in stage_works(sizes, tokens, prompt.new_tokens, precision, device.item_size):
        expected = estimate(work, device.rates[precision])
        peak = device.peaks.get(precision)
        at_peak = None if peak is None else estimate(work, peak).seconds * 1e3
        stages.append(_stage(work, at_peak, expected))
    return Plan(
        model=sizes.name,
        device=device.name,
        title=device.title,
        precision=precision,
        kept=model.kept,
        prompt=prompt,
        prompt_tokens=tokens.entering,
        tiles=tokens.tiles,
        parameters=parameters(sizes),
        memory=footprint(sizes, tokens, prompt.new_tokens, precision, device.item_size),
        usable=device.usable,
        stages=tuple(stages),
        findings=_findings(stages, device, precision, resizes=model.pruning.resizes),
        sources=(*model.notes, *device.sources),
    )


def _findings(
    stages: Sequence[StagePlan], device: PlannedDevice, precision: str, *, resizes: bool
) -> tuple[str, ...]:
    vision, projector, prefill, token = stages
    share = vision.expected_ms / (vision.expected_ms + projector.expected_ms + prefill.expected_ms)
    shorter = "resize has made it shorter" if resizes else "of all methods, resize alone shortens it"
    found = [f"The vision tower is {share:.0%} of the time to the first token; {shorter}."]
    if prefill.binds == "FLOPs":
        found.append("The prefill is compute-bound: fewer visual tokens shorten it.")
    else:
        found.append("The prefill is memory-bound: fewer visual tokens gain no more; fewer bits do.")
    if token.binds == "bytes":
        found.append(
            f"A later token is memory-bound: it reads {token.bytes / 1e9:.3g} GB of weights and cache. Fewer "
            "bits shorten it, and pruning by its share of the cache."
        )
    else:
        found.append("A later token is compute-bound, which is unusual: check whether the calibration fits.")
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


def _stage(work: StageWork, at_peak: float | None, expected: Estimate) -> StagePlan:
    flop = work.linear + work.attention
    return StagePlan(work.stage, flop, work.bytes, at_peak, expected.seconds * 1e3, expected.binds)
