"""Images of the demo: the bundled scene, a sheet of scenes, and the patches that each method keeps.

`python -m visprune.demo.pictures` writes `scene.png` and `questions.json` to the folder of this file, and the
images of `docs/demo.md` to another folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from visprune.demo import IMAGE, MODEL_DIR, QUESTIONS
from visprune.demo.checkpoint import PATCH
from visprune.demo.evaluate import METHODS, HeldOut, encode
from visprune.demo.language import answered
from visprune.demo.scenes import SceneQuestion, questions, scene
from visprune.demo.tower import encode_images

__all__ = ["main"]

_FINE = 4
_GAP = 12


def _sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + _GAP), i // columns * (height + _GAP)))
    return sheet


def _dimmed(picture: Image.Image, keep: NDArray[np.int64], title: str) -> Image.Image:
    """Return the image under a title, with all patches faded except the kept ones."""
    side = picture.width // (PATCH * 2)
    kept = np.zeros(side * side, bool)
    kept[keep] = True
    mask = np.kron(kept.reshape(side, side), np.ones((PATCH * 2, PATCH * 2), bool))[..., None]
    image = np.asarray(picture)
    faded = np.where(mask, image, image // 5 + 196).astype(np.uint8)
    framed = Image.new("RGB", (picture.width, picture.height + 22), "white")
    framed.paste(Image.fromarray(faded), (0, 22))
    ImageDraw.Draw(framed).text((2, 2), title, fill="black", font=ImageFont.load_default(14))
    return framed


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

    drawn = scene(options.seed)
    image = np.asarray(drawn.image)[None]
    data = HeldOut(image, *encode(model, image), [SceneQuestion("", "", drawn.things[0])])
    shown = []
    for method, select in METHODS.items():
        keep = select(data, 0.25, np.random.default_rng(0))[0]
        shown.append(_dimmed(scene(options.seed, 2).image, keep, method.split(" (")[0]))
    _sheet(shown, 5).save(options.docs / "demo-kept.png", optimize=True)


if __name__ == "__main__":
    main()
