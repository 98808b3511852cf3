"""Hands visprune altered files, of five kinds: each must work, or be refused with a sentence.

A kind is made with an empty folder. Called with a source of random numbers it writes an altered file there,
and gives a function that has visprune read it. `scripts/fuzz` runs them for as long as one likes.
"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from altering import alter_bytes, alter_text
from PIL import Image

from visprune.errors import VispruneError

__all__ = ["KINDS", "Checkpoints", "Kind", "Manifests", "Pictures", "Recipes", "Samples", "run_case"]

Kind: TypeAlias = Callable[[random.Random], Callable[[], object]]
Outcome: TypeAlias = Literal["accepted", "refused", "failed"]


class Manifests:
    """Bundles: as they are given, or of the demo model, pruned before the LLM and inside it."""

    def __init__(self, folder: Path, bundles: tuple[Path, ...] = ()) -> None:
        self.folders = []
        for index, bundle in enumerate(bundles or self._demos(folder)):
            shutil.copytree(bundle, folder / f"bundle{index}", dirs_exist_ok=True)
            self.folders.append(folder / f"bundle{index}")
        self.manifests = [(path / "visprune.json").read_text() for path in self.folders]
        self.settings = [(path / "preprocessor_config.json").read_text() for path in self.folders]
        self.picture = Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3))

    @staticmethod
    def _demos(folder: Path) -> Iterator[Path]:
        from visprune.export import export

        asked = ({"method": "fopru-rank", "ratio": 0.5}, {"method": "fastv", "ratio": 0.5})
        for index, options in enumerate(asked):
            yield export(output=folder / f"demo{index}", verify=False, **options).path

    def __call__(self, draw: random.Random) -> Callable[[], object]:
        index = draw.randrange(len(self.folders))
        folder, manifest, settings = (
            self.folders[index],
            self.manifests[index].encode(),
            self.settings[index].encode(),
        )
        if draw.random() < 0.15:
            settings = alter_text(self.settings[index], draw)
            told = json.loads(manifest)
            told["files"]["preprocessor_config.json"]["size"] = len(settings)
            manifest = json.dumps(told).encode()
        else:
            manifest = alter_text(self.manifests[index], draw)
        (folder / "visprune.json").write_bytes(manifest)
        (folder / "preprocessor_config.json").write_bytes(settings)
        images = [self.picture] * draw.choice((0, 1, 1, 2))
        return lambda: self._ask(folder, images)

    @staticmethod
    def _ask(folder: Path, images: list[Image.Image]) -> None:
        from visprune.runtime import load

        with load(folder, verify=False, threads=1) as pipeline:
            chat = pipeline.chat()
            chat.generate("What is in the picture?", images, max_new_tokens=2)
            chat.generate("And what else?", max_new_tokens=2)


class Recipes:
    """Recipes for the demo model, and the file of a published one."""

    def __init__(self, folder: Path) -> None:
        from visprune.export.checkpoint.find import find
        from visprune.pruning.published import published_recipes

        self.folder, self.number = folder, 0
        mass = [0.1, 0.1, 0.1]
        fitted = json.dumps(
            {
                **{"schema_version": 1, "method": "fitprune", "model": "visprune-demo"},
                **{"weights_sha256": find(None).weights_sha256(), "num_layers": 3, "hidden_size": 192},
                **{"intermediate_size": 512, "visual_tokens": 144, "scheme": [44, 54, 5], "alpha": 0.2},
                **{"convention": "F3, MAC, visual tokens only", "ratio": 0.5, "ratio_on_samples": 0.49},
                **{"ratio_reached": 0.4964, "samples": 16, "seed": 0, "max_prune_points": None},
                **{"lost_self": mass, "lost_cross": mass, "unconstrained": None},
            }
        )
        self.recipes = (fitted, published_recipes()["llava-1.5-7b-60"].to_json())

    def __call__(self, draw: random.Random) -> Callable[[], object]:
        path = self.folder / "recipe.json"
        path.write_bytes(alter_text(draw.choice(self.recipes), draw))
        return lambda: self._read(path)

    def _read(self, path: Path) -> None:
        from visprune.export.preview import preview
        from visprune.pruning.published import open_recipe

        open_recipe(path)
        preview(method="fitprune", recipe=path, output=self.folder / "bundle")


class Samples:
    """Lines that name pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        Image.new("RGB", (20, 10), (9, 90, 200)).save(folder / "a.png")
        url = "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode()
        told = {"prompt": "What is it?", "question": "What is it?", "answers": ["a"], "choices": ["x", "y"]}
        self.lines = [{"image": image, **told} for image in ("a.png", "./a.png", url)]

    def __call__(self, draw: random.Random) -> Callable[[], object]:
        path, lines = self.folder / "lines.jsonl", [json.dumps(line) for line in self.lines]
        content = "\n".join(lines).encode()
        if draw.random() < 0.8:
            index = draw.randrange(len(lines))
            content = b"\n".join([*(one.encode() for one in lines), alter_text(lines[index], draw)])
        else:
            content = alter_bytes(content, draw)
        path.write_bytes(content)
        return lambda: self._read(path)

    @staticmethod
    def _read(path: Path) -> None:
        from visprune.evaluation.questions import read_jsonl
        from visprune.runtime.samples import read_samples

        list(read_jsonl(path))
        read_samples(path, max_skipped=0.5)


class Checkpoints:
    """The demo model's checkpoint. One in a hundred is exported too, without a comparison with PyTorch."""

    def __init__(self, folder: Path) -> None:
        from visprune.demo import MODEL_DIR

        self.folder = folder / "checkpoint"
        shutil.copytree(MODEL_DIR, self.folder, dirs_exist_ok=True)
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.suffix != ".md"}

    def __call__(self, draw: random.Random) -> Callable[[], object]:
        for name, content in self.files.items():
            if (self.folder / name).read_bytes() != content:
                (self.folder / name).write_bytes(content)
        name = draw.choice(sorted(self.files))
        content = self.files[name]
        if name.endswith(".safetensors"):
            size = int.from_bytes(content[:8], "little")
            header = alter_text(content[8 : 8 + size].decode(), draw)
            length = len(header) if draw.random() < 0.9 else draw.choice((0, 2**62, 2**63, len(header) + 9))
            content = length.to_bytes(8, "little") + header + content[8 + size :]
        elif name.endswith(".json"):
            content = alter_text(content.decode(), draw)
        else:
            content = alter_bytes(content, draw)
        (self.folder / name).write_bytes(content)
        really = draw.random() < 0.01
        return lambda: self._export(really=really)

    def _export(self, *, really: bool) -> None:
        from visprune.export import export
        from visprune.export.preview import preview

        output = self.folder.parent / "exported"
        shutil.rmtree(output, ignore_errors=True)
        preview(self.folder, method="fopru-rank", ratio=0.5, output=output)
        if really:
            export(self.folder, method="fopru-rank", ratio=0.5, output=output, verify=False)


class Pictures:
    """Files of every format that is read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, []
        rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6  # the orientation
        Image.init()
        forms = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
        for form in (form for form in forms if form in Image.SAVE):
            self._save(rgb, format=form)
        for mode in ("RGBA", "LA", "P", "1", "I;16", "L"):
            image = rgb.convert("L").convert("I").convert(mode) if mode == "I;16" else rgb.convert(mode)
            self._save(image, format="PNG")
        self._save(rgb, format="JPEG", exif=exif)
        self._save(rgb.convert("CMYK"), format="JPEG")
        for mode in ("F", "I"):
            self._save(rgb.convert("L").convert(mode), format="TIFF")
        for form in ("GIF", "PNG", "WEBP"):
            self._save(rgb, format=form, save_all=True, append_images=[rgb.rotate(90 * i) for i in range(3)])

    def _save(self, image: Image.Image, **options: Any) -> None:
        file = io.BytesIO()
        image.save(file, **options)
        self.files.append(file.getvalue())

    def __call__(self, draw: random.Random) -> Callable[[], object]:
        content, path = alter_bytes(draw.choice(self.files), draw), self.folder / "picture"
        path.write_bytes(content)
        url = b"data:image/png;base64," + base64.b64encode(content)
        text = (alter_bytes(url, draw) if draw.random() < 0.5 else url).decode("utf-8", "surrogateescape")
        return lambda: self._decode(content, path, text)

    @staticmethod
    def _decode(content: bytes, path: Path, text: str) -> None:
        from visprune.runtime.vision.images import decode, decode_frames

        refused: VispruneError | None = None
        for read in (lambda: decode(content), lambda: decode_frames(path, 2), lambda: decode(text)):
            try:
                read()
            except VispruneError as error:
                refused = error
        if refused is not None:
            raise refused


KINDS: dict[str, Callable[[Path], Kind]] = {
    "manifest": Manifests,
    "recipe": Recipes,
    "samples": Samples,
    "checkpoint": Checkpoints,
    "pictures": Pictures,
}


def run_case(kind: Kind, name: str, seed: int, number: int) -> tuple[Outcome, str]:
    """One case, with what was said, or the traceback."""
    draw = random.Random(f"{name} {seed} {number}")
    try:
        kind(draw)()
    except VispruneError as error:
        spoken = error.what.strip() and error.hint.strip()
        return ("refused", str(error)) if spoken else ("failed", f"an error that says nothing: {error!r}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of native code is no Exception
        return "failed", traceback.format_exc()
    return "accepted", ""
