"""Options that `visprune run` and `visprune chat` share, and the checks of them before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from visprune.backend_choice import BackendChoice
from visprune.options import Option
from visprune.terminal import busy
from visprune.units import in_bytes

if TYPE_CHECKING:
    from PIL import Image

    from visprune.bundle import Bundle
    from visprune.runtime import Pipeline
    from visprune.runtime.options import AnswerOptions, ChatOptions
    from visprune.runtime.vision.kept_tokens import Keep

__all__ = ["CheckedOptions", "ConversationOptions", "open_pipeline"]


@dataclass(frozen=True, slots=True)
class CheckedOptions:
    """Options that fit a bundle, as the runtime takes them.

    Attributes:
        bundle: The bundle.
        keep: How many visual tokens are kept.
        chat: Options of the conversation.
        answer: Options of each answer.
        pictures: The images of `--image`, decoded.
    """

    bundle: Bundle
    keep: Keep
    chat: ChatOptions
    answer: AnswerOptions
    pictures: list[Image.Image]


@dataclass(frozen=True, slots=True)
class ConversationOptions(BackendChoice):
    """Options of a conversation, as they are given on the command line."""

    system: Annotated[str | None, Option("A system prompt, before all else.", metavar="TEXT")] = None
    # Texts and not paths, which would change a URL: a path turns // into /.
    image: Annotated[
        list[str] | None,
        Option(
            "An image, or a data: URL; may be given several times.", metavar="FILE", flags=("--image", "-i")
        ),
    ] = None
    temperature: Annotated[float, Option("Randomness; 0 takes the most probable token (greedy).")] = 0.0
    top_k: Annotated[int, Option("Draw from the k most probable tokens; 0 is all.")] = 0
    top_p: Annotated[float, Option("Draw from the most probable tokens that add up to this.")] = 1.0
    repetition_penalty: Annotated[
        float, Option("Above 1, makes tokens less probable that occurred before.")
    ] = 1.0
    seed: Annotated[int | None, Option("Seed of the random draws, for repeatable answers.")] = None
    stop: Annotated[
        list[str] | None,
        Option(
            "Text, or a special token's name, that ends an answer; may be given several times.",
            metavar="TEXT",
        ),
    ] = None
    ratio: Annotated[float | None, Option("Fraction of visual tokens to KEEP; by default the export's.")] = (
        None
    )
    keep_tokens: Annotated[int | None, Option("The same as a number of tokens of one image.")] = None

    def check(self, bundle: Path, max_new_tokens: int, prompt: str | None = None) -> CheckedOptions:
        """Refuse all that can be refused without the model, before gigabytes are hashed and loaded.

        Args:
            bundle: Directory of the bundle.
            max_new_tokens: The most tokens of one answer.
            prompt: The question, if it is known already.

        Raises:
            VispruneError: The bundle cannot be read, an option is wrong or does not fit the bundle, or a
                image cannot be read.
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
            opened,
            keep_for(opened.manifest, ratio=self.ratio, keep_tokens=self.keep_tokens),
            ChatOptions(system=self.system, ratio=self.ratio, keep_tokens=self.keep_tokens),
            AnswerOptions(max_new_tokens=max_new_tokens, sampling=sampling, stop=limits.stop),
            [decode(picture) for picture in self.image or []],
        )


def open_pipeline(
    bundle: Bundle, options: ConversationOptions, picture_cache: int = 0, *, wait: bool = True
) -> Pipeline:
    """Load a bundle, with a spinner on the terminal, and so many bytes for features of images.

    `wait` is that of `visprune.load`.
    """
    from visprune.runtime import load

    with busy(f"Loading {bundle.path}") as update:
        return load(
            bundle,
            provider=options.provider,
            threads=options.threads,
            low_memory=options.low_memory,
            wait=wait,
            picture_cache=picture_cache,
            on_file=lambda name, count: update(f"Checking {name} ({in_bytes(count)}), once"),
        )
