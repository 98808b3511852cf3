"""Resize: transformers with a smaller tower of the same weights is the oracle, for every family and size.

The oracle's tower has the table of positions interpolated by PyTorch, its images are shrunk by Pillow after
the processor's crop, and its grid pinpoints shrink with them.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from oracle import NEW, Oracle
from PIL import Image

import visprune
from visprune.errors import BundleError, InputError, UnsupportedError, UsageError
from visprune.estimate.flops import savings
from visprune.export import export
from visprune.export.models.positions import resampled_positions
from visprune.runtime import Video

SIGLIP = {"tower": "siglip", "strategy": "full", "feature_layer": -1}
LONG = (("max_position_embeddings", 2048),)
GRIDS = tuple((rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
FAMILIES = {
    "llava": {},
    "siglip": {**SIGLIP, "margin": 6, "text": "qwen2"},
    "cls kept": {"strategy": "full"},
    "vipllava": {"family": "vipllava", "tower_layers": 4, "feature_layer": (-2, -4, 2)},
    "next": {"family": "llava_next", "text_extra": LONG},
    "next-video": {"family": "llava_next_video", "text_extra": LONG},
    "onevision": {"family": "llava_onevision", **SIGLIP, "text_extra": LONG},
    "onevision resampled": {
        "family": "llava_onevision",
        **SIGLIP,
        "pinpoints": GRIDS,
        "max_tiles": 2,
        "text_extra": LONG,
    },
}
PATCH = 14


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("side", [4, 24, 27])
def test_positions_are_interpolated_as_pytorch_does(side):
    table = torch.randn(side * side, 8, generator=torch.Generator().manual_seed(side))
    square = table.double().reshape(1, side, side, 8).permute(0, 3, 1, 2)
    for rows, columns in [(1, 1), (2, 3), (side // 2, side // 2), (side - 1, side), (side + 5, 7)]:
        options = {"size": (rows, columns), "mode": "bicubic", "align_corners": False}
        want = torch.nn.functional.interpolate(square, **options).permute(0, 2, 3, 1).reshape(-1, 8)
        assert (resampled_positions(table, rows, columns) - want).abs().max() < 1e-5
    assert torch.equal(resampled_positions(table, side, side), table)


class Smaller(Oracle):
    """The same model with a tower of a smaller side."""

    def __init__(self, path, side):
        super().__init__(path)
        config = copy.deepcopy(self.model.config)
        self.whole = config.vision_config.image_size // PATCH
        self.edge = side * PATCH
        config.vision_config.image_size = self.edge
        if getattr(config, "image_grid_pinpoints", None):
            size = self.model.config.vision_config.image_size
            config.image_grid_pinpoints = [
                [edge // size * self.edge for edge in pair] for pair in config.image_grid_pinpoints
            ]
        weights = self.model.state_dict()
        (name,) = (name for name in weights if name.endswith("position_embedding.weight"))
        table, count = weights[name], self.whole**2
        square = table[-count:].reshape(1, self.whole, self.whole, -1).permute(0, 3, 1, 2)
        options = {"size": (side, side), "mode": "bicubic", "align_corners": False}
        smaller = torch.nn.functional.interpolate(square, **options).permute(0, 2, 3, 1).flatten(0, 2)
        weights[name] = torch.cat([table[:-count], smaller])
        self.model = type(self.model)(config).eval()
        self.model.load_state_dict(weights)
        self.model.set_attn_implementation("eager")
        self.config = config

    def shrunk(self, pixels, pipeline):
        """Shrink tiles [..., 3, H, W] of normalised pixels as 8-bit images."""
        processor = pipeline.loaded.pictures.processor
        mean, std = (np.array(v)[:, None, None] for v in (processor.mean, processor.std))
        levels = (pixels.numpy() * std + mean) / processor.rescale_factor
        views = np.rint(levels).astype(np.uint8).reshape(-1, *pixels.shape[-3:])
        resized = [
            Image.fromarray(view.transpose(1, 2, 0)).resize(
                (self.edge, self.edge), Image.Resampling(processor.resample)
            )
            for view in views
        ]
        made = np.stack([np.asarray(view).transpose(2, 0, 1) for view in resized])
        made = ((made * processor.rescale_factor).astype(np.float32) - mean) / std
        return torch.from_numpy(made.astype(np.float32)).reshape(*pixels.shape[:-2], self.edge, self.edge)

    def images(self, pictures):
        """What the smaller model takes."""
        made = super().images(pictures)
        made["pixel_values"] = self.shrunk(made["pixel_values"], self.pipeline)
        if "image_sizes" in made:
            # Sizes shrink too. Each is a multiple of the tile here, so that this changes no rounding.
            whole = made["image_sizes"] * self.edge
            made["image_sizes"] = whole // (self.whole * PATCH)
        return made


@pytest.fixture(scope="module", params=FAMILIES, ids=list(FAMILIES))
def made(request, checkpoint, tmp_path_factory):
    path = checkpoint(checkpoint.Tiny(**FAMILIES[request.param]))
    bundle = export(path, method="resize", ratio=0.6, output=tmp_path_factory.mktemp("resize") / "bundle")
    assert bundle.manifest.parity.verified
    with visprune.load(bundle.path) as pipeline:
        yield path, pipeline


def test_a_side_is_rounded_down(made):
    pipeline = made[1]
    pruning = pipeline.manifest.pruning
    assert (pruning.keep_tokens, pruning.resizes, pruning.needs_text) == (9, True, False)
    kept = [pruning.budget.from_ratio(ratio) for ratio in (1.0, 0.99, 0.5, 0.25, 0.11, 0.001)]
    assert kept == [16, 9, 4, 4, 1, 1]
    with pytest.raises(UsageError, match="15 is not the square of a side"):
        pipeline.generate(picture(56, 56), "What?", keep_tokens=15)


def test_the_whole_picture_is_the_unpruned_model(made):
    path, pipeline = made
    oracle = Oracle(path)
    for size in ((56, 56), (112, 168), (100, 60)):
        got = pipeline.generate(picture(*size), "What?", ratio=1.0, max_new_tokens=NEW)
        assert got.token_ids == oracle.generate([(1, "What?", None)], [picture(*size)])


@pytest.mark.parametrize("side", [3, 2, 1])
def test_a_smaller_picture_is_a_smaller_model(made, side):
    path, pipeline = made
    oracle = Smaller(path, side)
    oracle.pipeline = pipeline
    unit = oracle.whole * PATCH
    for size in ((unit, unit), (unit, 2 * unit), (3 * unit, unit)):
        if (
            side == 1
            and size[0] > unit
            and pipeline.manifest.tiling
            and pipeline.manifest.tiling.max_tiles == 2
        ):
            with pytest.raises(InputError, match="nothing would be left"):
                pipeline.generate(picture(*size), "What?", keep_tokens=1)
            continue
        shown = picture(*size, seed=side)
        got = pipeline.generate(shown, "What?", keep_tokens=side * side, max_new_tokens=NEW)
        assert got.token_ids == oracle.generate([(1, "What?", None)], [shown]), size
        assert list(got.keep_indices[0]) == sorted(got.keep_indices[0])
        assert got.visual_tokens > got.tokens_kept
    two = [picture(unit, unit, 1), picture(unit, unit, 2)]
    got = pipeline.generate(two, "And?", keep_tokens=side * side, max_new_tokens=NEW)
    assert got.token_ids == oracle.generate([(2, "And?", None)], two)


def test_a_smaller_video(made):
    path, pipeline = made
    if pipeline.loaded.pictures.video is None:
        pytest.skip("no videos")
    frames = [picture(60, 80, seed) for seed in range(3)]
    oracle = Smaller(path, 2)
    oracle.pipeline = pipeline
    pixels = np.concatenate([pipeline.loaded.pictures.video(frame) for frame in frames])
    shown = {"pixel_values_videos": oracle.shrunk(torch.from_numpy(pixels), pipeline)[None]}
    with torch.no_grad():
        length = oracle.model.get_video_features(**shown).pooler_output.shape[1]
    ids = oracle.ids([(0, "<video>\nWhat?", None)], [], length)
    got = pipeline.generate(Video(frames), "What?", keep_tokens=4, max_new_tokens=NEW)
    assert got.token_ids == oracle.answer(ids, shown)


def test_later_turns_and_the_overlay(made):
    pipeline = made[1]
    chat = pipeline.chat(keep_tokens=4)
    unit = pipeline.loaded.pictures.processor.output_size[0]
    first = chat.generate("One?", [picture(unit, unit)], max_new_tokens=2)
    second = chat.generate("Two?", [picture(unit, 2 * unit, 3)], max_new_tokens=2)
    assert first.tokens_kept == 4 * (1 + (pipeline.manifest.tiling is not None))
    for answer, size, number in ((first, (unit, unit), 1), (second, (unit, 2 * unit), 2)):
        drawn = pipeline.overlay(picture(*size), answer.keep_indices[0], images=number)
        told = pipeline.overlay(picture(*size), answer.keep_indices[0], images=number, keep_tokens=4)
        assert drawn.tobytes() == told.tobytes()


def test_work_counts_the_smaller_tower(made):
    manifest = made[1].manifest
    shapes, d = manifest.shapes, manifest.shapes.vision_hidden_size
    whole, half = (savings(manifest, keep_tokens=count) for count in (16, 4))
    assert whole.model.pruned == whole.model.unpruned == half.model.unpruned
    tiles = 1 if manifest.tiling is None else 1 + max(h * w for h, w in manifest.tiling.pinpoints) // 56**2

    def tower(patches):
        n = patches + shapes.vision_tokens - shapes.vision_patches
        layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * shapes.vision_intermediate_size
        return tiles * (shapes.vision_layers * layer + patches * shapes.patch_values * d)

    projected = sum(one * other for one, other in shapes.projector) * (16 - 4) * tiles
    saved = half.sequence.unpruned - half.sequence.pruned
    if manifest.tiling is None:
        saved += projected
        assert half.model.unpruned - half.model.pruned == saved + tower(16) - tower(4)
    assert half.model.unpruned - half.model.pruned >= saved + tower(16) - tower(4)


WRONG = {
    "not resized": {"resizing": None},
    "other patches": {"resizing": {"image_size": 56, "patch_size": 7}},
    "single tokens": {"budget": {"unit": "token"}},
    "a question": {"needs_text": True},
    "merged": {"merges": True},
}


@pytest.mark.parametrize("what", WRONG)
def test_an_altered_manifest_is_refused(what, checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny())
    bundle = export(path, method="resize", ratio=0.6, output=tmp_path / "bundle", verify=False)
    manifest = json.loads((bundle.path / "visprune.json").read_text())
    for name, value in WRONG[what].items():
        manifest["pruning"][name] = {**manifest["pruning"][name], **value} if name == "budget" else value
    (bundle.path / "visprune.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="of resize that does not fit the rest of the bundle"):
        visprune.load(bundle.path)


def test_a_tower_of_one_size_is_refused(checkpoint, tmp_path):
    """The first patch of a tower without a CLS token is dropped under `default`: no square is left."""
    path = checkpoint(checkpoint.Tiny(tower="siglip"))
    with pytest.raises(UnsupportedError, match="resize needs a square grid"):
        export(path, method="resize", ratio=0.25, output=tmp_path / "never")
    assert not (tmp_path / "never").exists()
