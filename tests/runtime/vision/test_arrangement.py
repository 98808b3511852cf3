"""Tiles and the order of their tokens, against transformers as the oracle."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from visprune.errors import InputError, UnsupportedError
from visprune.runtime.vision.arrangement import arrange, arrange_video, best_pinpoint, pixel_values, views
from visprune.runtime.vision.preprocess import ImageProcessor
from visprune.tiling import Tiling

NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ONEVISION_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
NEXT = Tiling(NEXT_PINPOINTS, 336, 24)
ONEVISION = Tiling(ONEVISION_PINPOINTS, 384, 27, max_tiles=9, several="whole")
TILINGS = {
    "next": NEXT,
    "onevision": ONEVISION,
    "onevision-max-1": Tiling(ONEVISION_PINPOINTS, 384, 27, max_tiles=1),
    "tiny": Tiling(((28, 28), (28, 84), (84, 28), (56, 56)), 28, 2),
    "tiny-odd": Tiling(tuple((42 * i, 42 * j) for i in range(1, 5) for j in range(1, 5)), 42, 3, max_tiles=2),
    "tiny-rest": Tiling(((60, 30), (30, 90), (90, 90)), 30, 2, max_tiles=3),  # tiles with a rest of 2 pixels
}
ODD_SIZES = [
    (1, 1),
    (1, 3),
    (5, 1000),
    (1000, 5),
    (1, 10_000),
    (10_000, 1),
    (336, 672),
    (335, 672),
    (337, 671),
]
NEWLINE = (7.0, 8.0)


def sizes(count):
    """Of every order of magnitude, and on the boundaries of pinpoints."""
    rng = random.Random(0)
    edges = [edge + off for edge in (28, 56, 84, 336, 384, 672, 768, 1152, 2304) for off in (-1, 0, 1)]
    some = [(rng.choice(edges), rng.choice(edges)) for _ in range(count // 2)]
    return ODD_SIZES + some + [tuple(int(10 ** rng.uniform(0, 3.7)) for _ in "hw") for _ in range(count // 2)]


def packed(tiling, size, features):
    """The sequence that transformers makes of [T, N, D] features."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    vision = SimpleNamespace(image_size=tiling.tile_size, patch_size=tiling.tile_size // tiling.side)
    pinpoints = [list(pinpoint) for pinpoint in tiling.pinpoints]
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    args = [torch.from_numpy(features)], [list(size)]
    if tiling.max_tiles is None:
        pack = transformers.LlavaNextModel.pack_image_features
        (sequence,), _ = pack(model, *args, "default", torch.tensor(NEWLINE))
    else:
        pack = transformers.LlavaOnevisionModel.pack_image_features
        aspect = f"anyres_max_{tiling.max_tiles}"
        (sequence,), _ = pack(model, *args, torch.tensor(NEWLINE), aspect)
    return sequence.numpy()


def counted(tiling, size):
    """The placeholders that transformers' processors write for a picture."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlavaOnevisionProcessor if tiling.max_tiles else transformers.LlavaNextProcessor
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(p) for p in tiling.pinpoints]),
        patch_size=tiling.tile_size // tiling.side,
        num_additional_image_tokens=0,
        num_image_tokens=tiling.side**2,
        vision_aspect_ratio=f"anyres_max_{tiling.max_tiles}",
    )
    processor._get_unpadded_features = lambda *args: kind._get_unpadded_features(processor, *args)
    return kind._get_number_of_features(processor, *size, tiling.tile_size, tiling.tile_size)


def sequence(arrangement, features):
    """The sequence that the index maps make of [T, N, D] features; NaN where nothing is put."""
    flat = features.reshape(-1, features.shape[-1])
    tokens = (arrangement.weights[..., None] * flat[arrangement.sources]).sum(2)  # [T, N, D]
    out = np.full((arrangement.tokens, flat.shape[1]), np.nan, dtype=np.float32)
    used = arrangement.places >= 0
    out[arrangement.places[used]] = tokens[used]
    out[arrangement.newline_places] = NEWLINE
    return out


def features_of(arrangement):
    shape = (*arrangement.places.shape, 2)
    return np.random.default_rng(arrangement.tokens).standard_normal(shape).astype(np.float32)


def check_slots(arrangement, side):
    """Every place is taken once, and in each tile the tokens are a grid in the order of the sequence."""
    placed = arrangement.places[arrangement.places >= 0]
    everything = np.sort(np.concatenate([placed, arrangement.newline_places]))
    assert (everything == np.arange(arrangement.tokens)).all()
    assert (arrangement.newline_places[1:] > arrangement.newline_places[:-1]).all()
    used = arrangement.places >= 0
    assert (arrangement.weights[~used] == 0).all()
    assert np.allclose(arrangement.weights[used].sum(-1), 1)
    for tile in arrangement.places.reshape(-1, side, side):
        rows, columns = np.nonzero(tile >= 0)
        grid = tile[np.unique(rows)][:, np.unique(columns)]
        assert (grid >= 0).all()
        assert grid.size == len(rows)
        assert (np.diff(grid, axis=1) == 1).all()
        assert (np.diff(grid, axis=0) > 0).all()


@pytest.mark.parametrize("name", TILINGS)
def test_the_order_is_that_of_transformers(name):
    tiling, count = TILINGS[name], 1500 if name.startswith("tiny") else 200
    resampled = 0
    for size in sizes(count):
        arrangement = arrange(size, tiling)
        features = features_of(arrangement)
        expected = packed(tiling, size, features)
        ours = sequence(arrangement, features)
        assert ours.shape == expected.shape, size
        assert counted(tiling, size) == arrangement.tokens, size
        mixed = arrangement.sources.shape[2] > 1
        assert (abs(ours - expected) <= (1e-5 if mixed else 0)).all(), size
        resampled += mixed
        rows, columns = arrangement.grid
        assert arrangement.visual_tokens == tiling.side**2 + rows * columns
    assert bool(resampled) == (tiling.max_tiles is not None)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_slots_are_grids(tiling):
    for size in sizes(100):
        check_slots(arrange(size, tiling), tiling.side)


def test_slots_are_patches_where_nothing_is_resampled():
    arrangement = arrange((480, 640), NEXT)
    assert arrangement.grid == (36, 48)
    assert arrangement.sources.shape == (5, 576, 1)
    assert (arrangement.sources.reshape(-1) == np.arange(5 * 576)).all()
    padding = arrangement.places[1].reshape(24, 24)
    assert (padding[:6] == -1).all()  # black rows above the picture
    assert (padding[6:] >= 0).all()


def test_resampled_tokens_lie_in_the_tile_that_shows_them():
    arrangement = arrange((2304, 2304), ONEVISION)
    assert arrangement.tiles == 37
    assert arrangement.grid == (81, 81)
    used = np.count_nonzero(arrangement.places >= 0, axis=1)
    assert set(used[1:]) <= {13 * 13, 13 * 14, 14 * 14}
    shown = arrangement.sources // 729 == np.arange(37)[:, None, None]
    assert shown.any(-1)[arrangement.places >= 0].all()


@pytest.mark.parametrize(
    ("size", "tiling", "grid"),
    [
        ((5, 1000), NEXT, (0, 72)),
        ((1, 10_000), NEXT, (0, 48)),
        ((10_000, 1), NEXT, (24, 0)),
        ((1, 1000), ONEVISION, (1, 81)),
    ],
)
def test_of_a_thread_hardly_anything_is_left(size, tiling, grid):
    arrangement = arrange(size, tiling)
    assert arrangement.grid == grid
    assert len(arrangement.newline_places) == grid[0]


def test_a_thread_of_which_resampling_leaves_nothing():
    tiling = Tiling(((42, 420),), 42, 3, max_tiles=1)
    with pytest.raises(InputError, match="50 x 2 pixels is too elongated"):
        arrange((2, 50), tiling)
    with pytest.raises(RuntimeError, match="greater than 0"):
        packed(tiling, (2, 50), np.zeros((11, 9, 2), dtype=np.float32))


def test_a_picture_that_is_not_tiled():
    arrangement = arrange((480, 640), ONEVISION, tiled=False)
    assert (arrangement.tiles, arrangement.visual_tokens, arrangement.tokens) == (1, 729, 730)
    assert arrangement.grid == (0, 0)
    features = features_of(arrangement)
    assert (sequence(arrangement, features) == packed(ONEVISION, (480, 640), features)).all()


@pytest.mark.parametrize("side", [1, 2, 3, 14, 27])
def test_a_video_is_pooled_as_transformers_does(side):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiling = Tiling(((side * 14, side * 14),), side * 14, side)
    arrangement = arrange_video(3, tiling)
    check_slots(arrangement, side)
    features = features_of(arrangement)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=side * 14, patch_size=14))
    pool = transformers.LlavaOnevisionModel.apply_pooling
    pooled = pool(SimpleNamespace(config=config), torch.from_numpy(features)).reshape(-1, 2).numpy()
    ours = sequence(arrangement, features)
    assert abs(ours[:-1] - pooled).max() < 1e-5
    assert arrangement.newline_places.tolist() == [len(pooled)]
    assert arrangement.grid == (0, 0)


@pytest.mark.parametrize(("side", "edge"), [(1, 1), (4, 2), (5, 2), (24, 2), (7, 3), (3, 3), (4, 1)])
def test_a_video_is_averaged_as_torch_does(side, edge):
    """Lines that make no whole square are left out, and no newline follows."""
    torch = pytest.importorskip("torch")
    tiling = Tiling(((side * 14, side * 14),), side * 14, side, frame_pooling=edge)
    arrangement = arrange_video(3, tiling)
    check_slots(arrangement, side)
    assert arrangement.sources.shape == (3, side**2, edge**2)
    features = features_of(arrangement)
    grids = torch.from_numpy(features).reshape(3, side, side, 2).permute(0, 3, 1, 2)
    pooled = torch.nn.AvgPool2d(edge)(grids).flatten(2).transpose(1, 2).reshape(-1, 2).numpy()
    ours = sequence(arrangement, features)
    assert ours.shape == pooled.shape
    assert abs(ours - pooled).max() < 1e-6
    assert (arrangement.newline_places.tolist(), arrangement.grid) == ([], (0, 0))


def test_a_video_without_frames():
    with pytest.raises(InputError, match="no frames"):
        arrange_video(0, ONEVISION)


def test_one_arrangement_serves_all_pictures_of_a_size():
    arrangement = arrange((480, 640), NEXT)
    assert arrange((480, 640), NEXT) is arrangement
    assert arrange((480, 640), NEXT, tiled=False) is not arrangement
    with pytest.raises(ValueError, match="read-only"):
        arrangement.places[0, 0] = 3


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_the_best_pinpoint_is_that_of_transformers(tiling):
    pytest.importorskip("transformers")
    from transformers.image_processing_utils import select_best_resolution

    for size in sizes(1000):
        assert best_pinpoint(size, tiling) == select_best_resolution(size, list(tiling.pinpoints)), size


# Pixels

PROCESSORS = {
    "next": (
        NEXT,
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in NEXT_PINPOINTS],
        },
    ),
    "onevision": (
        ONEVISION,
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    ),
    "next-tiny": (
        Tiling(((28, 56), (56, 28), (56, 56)), 28, 2),
        {
            "image_processor_type": "LlavaNextImageProcessorFast",
            "size": {"shortest_edge": 33},  # tiles grow to 33 pixels and lose their borders again
            "crop_size": 28,
            "resample": 2,
            "do_pad": False,
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
    ),
    "onevision-tiny": (
        Tiling(((28, 28), (28, 84), (84, 28)), 28, 2, several="whole"),
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 28, "width": 28},
            "do_normalize": False,
            "image_grid_pinpoints": [[28, 28], [28, 84], [84, 28]],
        },
    ),
}
PIXEL_SIZES = [
    *ODD_SIZES,
    *[(480, 640), (641, 427), (300, 1200), (1200, 300), (97, 97), (20, 17), (28, 56), (29, 57), (27, 55)],
    *[(336, 336), (672, 672), (673, 671), (384, 384), (385, 383), (768, 384), (1009, 335), (1152, 1153)],
]


def picture(height, width):
    rng = np.random.default_rng(width * 7919 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)).resize((width, height))
    noise = rng.integers(-40, 41, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))


def reference(config):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name = config["image_processor_type"].removesuffix("Fast")
    return getattr(transformers, f"{name}Pil").from_dict(dict(config))


@pytest.mark.parametrize(("tiling", "config"), PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_equal_transformers_bit_for_bit(tiling, config):
    theirs, ours = reference(config), ImageProcessor.from_config(config)
    for size in PIXEL_SIZES:
        image = picture(*size)
        expected = theirs(image, return_tensors="np")["pixel_values"][0].astype(np.float32)
        values = pixel_values(image, tiling, ours)
        assert values.dtype == np.float32
        assert values.shape == expected.shape, size
        assert (values == expected).all(), size
        assert arrange(size, tiling).tiles == len(values)


@pytest.mark.parametrize("name", ["onevision", "onevision-tiny"])
def test_pixels_of_several_pictures(name):
    tiling, config = PROCESSORS[name]
    theirs, ours = reference(config), ImageProcessor.from_config(config)
    images = [picture(*size) for size in ((40, 90), (91, 30), (50, 50), (1, 200))]
    expected = theirs([images], return_tensors="np")["pixel_values"]
    values = [pixel_values(image, tiling, ours, tiled=False) for image in images]
    assert (np.stack(values) == expected.astype(np.float32)).all()


def test_views_are_what_the_pixels_hold():
    tiling, config = PROCESSORS["next-tiny"]
    processor = ImageProcessor.from_config({**config, "do_normalize": False, "do_rescale": False})
    image = picture(90, 100)
    seen = views(image, tiling, processor)
    assert {view.size for view in seen} == {(28, 28)}
    stacked = np.stack([np.asarray(view) for view in seen]).transpose(0, 3, 1, 2)
    assert (stacked == pixel_values(image, tiling, processor)).all()


def test_a_processor_of_another_size():
    with pytest.raises(UnsupportedError, match="384 x 384"):
        views(picture(20, 30), NEXT, ImageProcessor.from_config(PROCESSORS["onevision"][1]))


def test_a_picture_that_cannot_be_tiled():
    processor = ImageProcessor.from_config(PROCESSORS["next"][1])
    with pytest.raises(InputError, match="mode L"):
        views(Image.new("L", (30, 20)), NEXT, processor)
    with pytest.raises(InputError, match="elongated"):
        views(Image.new("RGB", (2**20 + 1, 1)), NEXT, processor)
