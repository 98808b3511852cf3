"""Images of the demo: the bundled scene, a sheet of scenes, and the patches that each method keeps.

`python -m visprune.demo.pictures` writes `scene.png` and `questions.json` to the folder of this file, and the
images of `docs/demo.md` to another folder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from visprune.demo import IMAGE, MODEL_DIR, QUESTIONS
from visprune.demo.checkpoint import PATCH
from visprune.demo.evaluate import look
from visprune.demo.language import answered
from visprune.demo.scenes import SceneQuestion, questions, scene
from visprune.demo.table_methods import METHODS, Chosen
from visprune.demo.tower import encode_images

__all__ = ["main"]

_FINE = 4
_GAP = 12
_KEPT = 36  # tokens of 144 in the picture of the methods


def _sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + _GAP), i // columns * (height + _GAP)))
    return sheet


def _titled(picture: Image.Image, title: str) -> Image.Image:
    framed = Image.new("RGB", (picture.width, picture.height + 22), "white")
    framed.paste(picture, (0, 22))
    ImageDraw.Draw(framed).text((2, 2), title, fill="black", font=ImageFont.load_default(14))
    return framed


def _dimmed(picture: Image.Image, chosen: Chosen) -> Image.Image:
    """Return the image with its patches faded: not at all if kept, half if merged into another token."""
    size = PATCH * 2
    side = picture.width // size
    strength = np.full(side * side, 0.2)
    if chosen.weights is not None:
        strength[chosen.weights[0].any(dim=0).numpy()] = 0.5
    indices = chosen.indices[0]
    strength[indices[indices >= 0].numpy()] = 1.0
    mask = np.kron(strength.reshape(side, side), np.ones((size, size)))[..., None]
    faded = np.asarray(picture) * mask + 245 * (1 - mask)
    return Image.fromarray(faded.astype(np.uint8))


def _shrunk(picture: Image.Image, count: int) -> Image.Image:
    """Return the image as the vision tower sees it after `resize`, as large as before."""
    small = picture.resize((math.isqrt(count) * PATCH,) * 2, Image.Resampling.BICUBIC)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def _ask(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Image.Image, list[SceneQuestion]]:
    """Return the scene of a seed, drawn finely, and the questions about it that the model answers right."""
    picture = scene(seed, _FINE).image
    # Resized as by the image processor, because the model must answer about the file that is shipped.
    small = np.asarray(picture.resize((picture.width // _FINE,) * 2, Image.Resampling.BICUBIC))
    features = encode_images(model.model.vision_tower, small[None])
    asked = questions(scene(seed).things, np.random.default_rng(seed))
    right = answered(model, tokenizer, torch.from_numpy(features).expand(len(asked), -1, -1), asked)
    return picture, [q for q, ok in zip(asked, right, strict=True) if ok]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all images."""
    parser = argparse.ArgumentParser(description="Draw the images of the demo.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--docs", type=Path, default=Path("docs/images"))
    parser.add_argument("--seed", type=int, default=5, help="the held-out scene to bundle")
    options = parser.parse_args(arguments)
    options.docs.mkdir(parents=True, exist_ok=True)
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    picture, right = _ask(model, tokenizer, options.seed)
    picture.save(IMAGE, optimize=True)
    one_each = {q.thing.category: q for q in right}
    bundled = [{"question": q.text, "answer": q.answer} for q in one_each.values()]
    QUESTIONS.write_text(json.dumps(bundled, indent=2) + "\n", encoding="utf-8")
    print(f"{len(right)} of 12 questions answered right; bundled: {bundled}")

    _sheet([scene(seed, 2).image for seed in range(8)], 4).save(
        options.docs / "demo-scenes.png", optimize=True
    )

    drawn, large = scene(options.seed), scene(options.seed, 2).image
    data = look(model, tokenizer, np.asarray(drawn.image)[None], right[:1])
    rng = np.random.default_rng(0)
    shown = [
        _titled(_dimmed(large, METHODS[name](data, _KEPT, rng)), name.split(" (")[0]) for name in METHODS
    ]
    shown.append(_titled(_shrunk(large, _KEPT), "resize"))
    _sheet(shown, 5).save(options.docs / "demo-kept.png", optimize=True)


if __name__ == "__main__":
    main()
