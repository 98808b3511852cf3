"""Training of the demo model from scratch: `python -m visprune.demo.train --out DIR`.

It has two stages, as the training of LLaVA: first the vision tower (`tower.py`), then projector and language
model on the features of the frozen tower (`language.py`). It takes about an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from visprune.demo import MODEL_DIR
from visprune.demo.checkpoint import build_config, build_tokenizer, write_checkpoint
from visprune.demo.evaluate import hold_out, summary
from visprune.demo.language import LanguageSettings, train_language
from visprune.demo.scenes import Thing, draw, questions
from visprune.demo.tower import TowerSettings, encode_images, train_tower

__all__ = ["main"]

_FIRST_TRAINING_SCENE = 1_000_000  # the lowest seed of a training scene
_SCENES = 24_000
_ENCODED = 12_000  # stage 2 uses this many scenes, the first ones of stage 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="checkpoint directory to write")
    parser.add_argument("--log", type=Path, help="by default train.log beside the checkpoint directory")
    parser.add_argument("--tower", type=Path, help="a file: read if it exists, else written after stage 1")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def _fit_tower(
    tower: CLIPVisionModel,
    images: NDArray[np.uint8],
    things: Sequence[Sequence[Thing]],
    options: argparse.Namespace,
    rng: np.random.Generator,
    say: Callable[[str], None],
) -> None:
    """Run stage 1, or read the tower that an earlier stage 1 wrote to a file."""
    if options.tower and options.tower.exists():
        tower.load_state_dict(torch.load(options.tower))
        say(f"stage 1, the tower: read from {options.tower.name}")
        return
    settings = TowerSettings()
    say(f"stage 1, the tower: {settings}")
    train_tower(tower, images, things, settings, rng, lambda n, text: say(f"step {n} {text}"))
    if options.tower:
        torch.save(tower.state_dict(), options.tower)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the model, and write its checkpoint."""
    options = _options(arguments)
    log_file: Path = options.log or options.out.with_name("train.log")
    started = time.perf_counter()
    with log_file.open("w", encoding="utf-8") as log:

        def say(text: str) -> None:
            line = f"{time.perf_counter() - started:6.0f} s  {text}"
            print(line, flush=True)
            print(line, file=log, flush=True)

        # Each part has its own generator, so that reading a stored tower does not change the later parts.
        rng_text, rng_tower, rng_language = np.random.default_rng(options.seed).spawn(3)
        torch.manual_seed(options.seed)
        say(f"seed {options.seed}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        images, things = draw(range(_FIRST_TRAINING_SCENE, _FIRST_TRAINING_SCENE + _SCENES))
        say(f"{len(images)} training scenes drawn")
        tokenizer = build_tokenizer(
            f"USER: \n{q.text} ASSISTANT: {q.answer}" for t in things[:2000] for q in questions(t, rng_text)
        )
        model = LlavaForConditionalGeneration(build_config(len(tokenizer)))
        count = sum(p.numel() for p in model.parameters())
        say(f"{count:,} parameters, a vocabulary of {len(tokenizer)} tokens")

        tower = model.model.vision_tower
        _fit_tower(tower, images, things, options, rng_tower, say)
        tower.requires_grad_(False)
        tower.half().float()  # stage 2 must see the features of the weights as they will be stored
        features = encode_images(tower, images[:_ENCODED])
        say(f"features of {len(features)} images, {features.nbytes / 1e6:.0f} MB")

        settings = LanguageSettings()

        def report(step: int, text: str) -> None:
            if step % 200 == 0 or step == settings.steps:
                text += f"; held out: {summary(model, tokenizer, hold_out(model, tokenizer, 500))}"
            say(f"step {step}: {text}")

        say(f"stage 2, projector and language model: {settings}")
        train_language(model, tokenizer, features, things, settings, rng_language, report)
        write_checkpoint(model, tokenizer, options.out)
        say("checkpoint written")


if __name__ == "__main__":
    main()
