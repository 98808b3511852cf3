"""Options that `visprune run` and `visprune chat` share, and the checks of them before a model is loaded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from visprune.commands.arguments import (
    Images,
    KeepTokens,
    LowMemory,
    Provider,
    Ratio,
    RepetitionPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from visprune.terminal import busy
from visprune.units import in_bytes

if TYPE_CHECKING:
    from PIL import Image

    from visprune.manifest import Manifest
    from visprune.runtime import Pipeline
    from visprune.runtime.options import AnswerOptions, ChatOptions
    from visprune.runtime.vision.kept_tokens import Keep

__all__ = ["CheckedOptions", "ConversationOptions", "open_pipeline", "with_conversation_options"]

Command = Callable[..., None]


@dataclass(frozen=True, slots=True)
class CheckedOptions:
    """Options that fit a bundle, as the runtime takes them.

    Attributes:
        manifest: Manifest of the bundle.
        keep: How many visual tokens are kept.
        chat: Options of the conversation.
        answer: Options of each answer.
        pictures: The pictures of `--image`, decoded.
    """

    manifest: Manifest
    keep: Keep
    chat: ChatOptions
    answer: AnswerOptions
    pictures: list[Image.Image]


@dataclass(frozen=True, slots=True)
class ConversationOptions:
    """The options as they are given on the command line; `arguments` has their help texts."""

    system: System = None
    image: Images = None
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = None
    stop: Stop = None
    ratio: Ratio = None
    keep_tokens: KeepTokens = None
    provider: Provider = "cpu"
    threads: Threads = None
    low_memory: LowMemory = False

    def check(self, bundle: Path, max_new_tokens: int, prompt: str | None = None) -> CheckedOptions:
        """Refuse all that can be refused without the model, before gigabytes are hashed and loaded.

        Args:
            bundle: Directory of the bundle.
            max_new_tokens: The most tokens of one answer.
            prompt: The question, if it is known already.

        Raises:
            VispruneError: The bundle cannot be read, an option is wrong or does not fit the bundle, or a
                picture cannot be read.
        """
        from visprune.bundle import Bundle
        from visprune.runtime.generation import GenerationLimits
        from visprune.runtime.options import AnswerOptions, ChatOptions
        from visprune.runtime.prompts import check_prompt
        from visprune.runtime.reading import check_texts
        from visprune.runtime.sampling import Sampling
        from visprune.runtime.vision.images import decode
        from visprune.runtime.vision.kept_tokens import keep_for

        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)
        limits = GenerationLimits(max_new_tokens, tuple(self.stop or ()))
        opened = Bundle.open(bundle)
        if prompt is not None:
            check_prompt(prompt, opened.manifest)
        check_texts(opened, system=self.system, stop=limits.stop)
        return CheckedOptions(
            opened.manifest,
            keep_for(opened.manifest, ratio=self.ratio, keep_tokens=self.keep_tokens),
            ChatOptions(system=self.system, ratio=self.ratio, keep_tokens=self.keep_tokens),
            AnswerOptions(max_new_tokens=max_new_tokens, sampling=sampling, stop=limits.stop),
            [decode(picture) for picture in self.image or []],
        )


def with_conversation_options(command: Command) -> Command:
    """Decorate a command that takes `options: ConversationOptions`.

    The decorated command has a parameter for each of the options in the place of `options`, makes
    `ConversationOptions` of their values, and calls the command with it.
    """
    hints = get_type_hints(ConversationOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(ConversationOptions)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += shared if parameter.name == "options" else [parameter]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        options = ConversationOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(options=options, **given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def open_pipeline(bundle: Path, options: ConversationOptions) -> Pipeline:
    """Load a bundle, with a spinner on the terminal."""
    from visprune.runtime import load

    with busy(f"Loading {bundle}") as update:
        return load(
            bundle,
            provider=options.provider,
            threads=options.threads,
            low_memory=options.low_memory,
            on_file=lambda name, count: update(f"Checking {name} ({in_bytes(count)}), once"),
        )
