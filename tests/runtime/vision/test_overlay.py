"""Drawing what was kept, of a plain picture and of a tiled one."""

import numpy as np
import pytest
from PIL import Image

from visprune.errors import UsageError
from visprune.runtime.vision.arrangement import arrange
from visprune.runtime.vision.overlay import overlay, overlay_tiled
from visprune.runtime.vision.preprocess import ImageProcessor
from visprune.tiling import Tiling


def test_overlay_dims_dropped_patches_and_frames_kept_ones():
    picture = Image.new("RGB", (28, 28), (200, 40, 40))
    drawn = np.asarray(overlay(picture, np.array([1], dtype=np.int64), (2, 2)))
    assert drawn.shape == (504, 504, 3)  # 18 times: the first whole factor that reaches 480
    assert drawn[126, 378].tolist() == [200, 40, 40]  # inside the kept patch
    red, green, blue = drawn[378, 126].tolist()
    assert red == green == blue < 60
    assert drawn[0, 252].tolist() == drawn[251, 300].tolist() == [255, 176, 0]
    assert drawn[252, 300].tolist() == [red] * 3


def test_overlay_keeps_large_pictures_and_leaves_the_rest_of_a_division_dimmed():
    picture = Image.new("RGB", (500, 498), (200, 40, 40))
    drawn = np.asarray(overlay(picture, np.arange(9), (3, 3)))
    assert drawn.shape == (498, 500, 3)
    assert drawn[250, 499].tolist() != [200, 40, 40]
    assert drawn[166, 166].tolist() == [200, 40, 40]  # no line between two kept patches
    none = np.asarray(overlay(picture, np.array([], dtype=np.int64), (3, 3)))
    assert (none == none[0, 0]).all()


def test_overlay_refuses_what_does_not_fit():
    picture = Image.new("RGB", (28, 28))
    for keep, grid in (([4], (2, 2)), ([-1], (2, 2)), ([0], (29, 1)), ([0], (0, 2))):
        with pytest.raises(UsageError):
            overlay(picture, np.array(keep), grid)


TILING = Tiling(((30, 60), (60, 60)), 30, 2)  # patches of 15 pixels
PROCESSOR = ImageProcessor.from_config(
    {"image_processor_type": "LlavaNextImageProcessor", "size": 30, "crop_size": 30}
)


def is_grey(colour):
    return len(set(colour)) == 1


def test_a_tiled_picture_shows_the_whole_and_its_tiles():
    picture = Image.new("RGB", (60, 30), (200, 40, 40))
    arrangement = arrange((30, 60), TILING)
    assert arrangement.grid == (2, 4)
    first, last = 0, 2 * 4 + 3  # a corner of the whole picture; the lower right of the second tile
    drawn = overlay_tiled(picture, TILING, PROCESSOR, np.array([last, first]))
    assert drawn.size == (480 + 16 + 960, 480)
    assert drawn.getpixel((120, 120)) == (200, 40, 40)
    assert is_grey(drawn.getpixel((360, 120)))
    left = 480 + 16
    kept = [
        not is_grey(drawn.getpixel((left + 120 + 240 * x, 120 + 240 * y))) for y in (0, 1) for x in range(4)
    ]
    assert kept == [False] * 7 + [True]


def test_a_tiled_picture_is_drawn_without_its_padding():
    picture = Image.new("RGB", (60, 40), (200, 40, 40))
    arrangement = arrange((40, 60), TILING)
    assert (arrangement.tiles, arrangement.grid) == (5, (2, 4))
    kept = np.flatnonzero(arrangement.places.reshape(-1) >= 0)
    drawn = overlay_tiled(picture, TILING, PROCESSOR, kept)
    assert drawn.size == (480 + 16 + 960, 480)
    assert {drawn.getpixel((496 + 60 * i, y)) for i in range(1, 16) for y in (60, 420)} == {(200, 40, 40)}


def test_resampled_patches_are_drawn_in_their_grid():
    tiling = Tiling(((60, 60),), 30, 2, max_tiles=2)
    arrangement = arrange((60, 60), tiling)
    assert arrangement.grid == (2, 2)
    third = int(
        np.flatnonzero(arrangement.places.reshape(-1) == 4 + 3)[0]
    )  # after a row of two and its newline
    drawn = overlay_tiled(Image.new("RGB", (60, 60), (200, 40, 40)), tiling, PROCESSOR, np.array([third]))
    left = drawn.width - drawn.height
    at = [
        drawn.getpixel((left + drawn.height * x // 4, drawn.height * y // 4)) for y in (1, 3) for x in (1, 3)
    ]
    assert [is_grey(colour) for colour in at] == [True, True, False, True]


def test_a_strip_gets_lower_than_the_whole_picture():
    tiling = Tiling(((30, 300),), 30, 2)
    drawn = overlay_tiled(Image.new("RGB", (300, 30), (200, 40, 40)), tiling, PROCESSOR, np.arange(44))
    assert drawn.size == (480 + 16 + 4 * 480, 480)
    assert drawn.getpixel((1000, 240)) == (200, 40, 40)
    assert drawn.getpixel((1000, 100)) == (0, 0, 0)


def test_only_the_whole_picture_where_there_is_nothing_else():
    onevision = ImageProcessor.from_config(
        {"image_processor_type": "LlavaOnevisionImageProcessor", "size": 30}
    )
    picture = Image.new("RGB", (60, 20), (200, 40, 40))
    drawn = overlay_tiled(picture, TILING, onevision, np.array([1]), tiled=False)
    assert drawn.size == (480, 480)
    thread = Image.new("RGB", (900, 1), (200, 40, 40))
    assert 0 in arrange((1, 900), TILING).grid
    assert overlay_tiled(thread, TILING, PROCESSOR, np.array([1])).size == (480, 480)


@pytest.mark.parametrize("index", [-1, 12, 20])
def test_an_index_that_stands_for_no_token(index):
    with pytest.raises(UsageError, match="60 x 30"):
        overlay_tiled(Image.new("RGB", (60, 30)), TILING, PROCESSOR, np.array([index]))


def test_a_slot_of_padding_stands_for_no_token():
    tiling = Tiling(((60, 60),), 30, 2)
    assert arrange((30, 60), tiling).grid == (2, 4)
    with pytest.raises(UsageError, match="stands for none"):
        overlay_tiled(Image.new("RGB", (60, 30)), tiling, PROCESSOR, np.array([4]))


BLUE, ORANGE = (70, 160, 255), (255, 176, 0)


def is_merged(colour):
    red, green, blue = map(int, colour)
    return red < green < blue < 200


def test_merged_patches_look_neither_kept_nor_dropped():
    picture = Image.new("RGB", (42, 42), (200, 140, 40))
    drawn = np.asarray(overlay(picture, np.array([4, 0]), (3, 3), np.array([1, 4, 8])))
    middles = drawn[84::168, 84::168].reshape(9, 3)
    assert [index for index, colour in enumerate(middles) if is_merged(colour)] == [1, 8]
    assert [index for index, colour in enumerate(middles) if is_grey(colour.tolist())] == [2, 3, 5, 6, 7]
    assert middles[0].tolist() == middles[4].tolist() == [200, 140, 40]
    assert middles[2].sum() < middles[1].sum() < middles[0].sum()
    assert tuple(drawn[0, 84]) == ORANGE
    assert tuple(drawn[0, 252]) == tuple(drawn[503, 420]) == BLUE
    assert is_merged(drawn[84, 169])  # there is no blue line where a kept patch has its own
    none = np.asarray(overlay(picture, np.array([0, 4]), (3, 3), np.array([0, 4])))
    np.testing.assert_array_equal(none, np.asarray(overlay(picture, np.array([0, 4]), (3, 3))))


def test_merged_patches_of_another_picture_are_refused():
    for wrong in (-1, 4):
        with pytest.raises(UsageError, match="outside a grid"):
            overlay(Image.new("RGB", (28, 28)), np.array([0]), (2, 2), np.array([wrong]))
    for wrong in (-1, 12):
        with pytest.raises(UsageError, match="stands for none"):
            overlay_tiled(Image.new("RGB", (60, 30)), TILING, PROCESSOR, np.array([0]), np.array([wrong]))


def test_merged_tokens_of_a_tiled_picture():
    picture = Image.new("RGB", (60, 30), (200, 140, 40))
    kept = np.array([2 * 4 + 3, 0])  # the lower right of the second tile; a corner of the whole picture
    drawn = overlay_tiled(picture, TILING, PROCESSOR, kept, np.array([2 * 4, 3]))
    whole = [drawn.getpixel((120 + 240 * x, 120 + 240 * y)) for y in (0, 1) for x in (0, 1)]
    assert [is_merged(colour) for colour in whole] == [False, False, False, True]
    right = [drawn.getpixel((496 + 120 + 240 * x, 120 + 240 * y)) for y in (0, 1) for x in range(4)]
    assert [is_merged(colour) for colour in right] == [False, False, True, False, False, False, False, False]
    assert [is_grey(colour) for colour in right] == [True, True, False, True, True, True, True, False]
