"""Decoding: one reading of every mode, and refusals that a user understands."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from visprune.errors import InputError, UsageError
from visprune.runtime.vision import images
from visprune.runtime.vision.images import decode, decode_frames


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width, height):
    """A PNG that names a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


def test_path_string_bytes_and_image_agree(tmp_path):
    image = Image.fromarray(noise(5, 7, 3))
    path = tmp_path / "a.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image):
        assert (pixels(decode(source)) == np.asarray(image)).all()


def test_decoding_again_changes_nothing_and_the_source_stays(tmp_path):
    image = Image.fromarray(noise(5, 7, 4))
    image.info["comment"] = "kept"
    once = decode(image)
    assert once.info == {}
    assert image.mode == "RGBA"
    assert image.info == {"comment": "kept"}
    assert (pixels(decode(once)) == pixels(once)).all()
    assert decode(once) is not once


def test_exif_orientation_is_applied():
    image = Image.fromarray(noise(4, 6, 3))
    exif = Image.Exif()
    for orientation, turned in ((6, np.rot90(noise(4, 6, 3), -1)), (3, np.rot90(noise(4, 6, 3), 2))):
        exif[0x0112] = orientation
        assert (pixels(decode(encoded(image, exif=exif))) == turned).all()
        tiff = encoded(image, "TIFF", exif=exif)
        assert (pixels(decode(tiff)) == turned).all()


def test_a_broken_exif_block_is_no_reason_to_refuse():
    decode(encoded(Image.fromarray(noise(4, 6, 3)), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff"))


def test_transparency_is_composited_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    assert pixels(decode(Image.fromarray(rgba)))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]
    grey = Image.fromarray(rgba[..., 2:].copy(), "LA")
    assert pixels(decode(encoded(grey)))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]


def test_a_transparent_colour_becomes_white():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(decode(encoded(palette, transparency=0)))[0].tolist() == [[255] * 3, [40, 50, 60]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert pixels(decode(encoded(grey, transparency=7)))[0].tolist() == [[255] * 3, [8] * 3]
    colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(decode(encoded(colour, transparency=(1, 2, 3))))[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode):
    image = Image.fromarray(noise(9, 5, 3)).convert(mode)
    assert (pixels(decode(image)) == np.asarray(image.convert("RGB"))).all()


def test_cmyk_jpeg():
    data = encoded(Image.fromarray(noise(9, 5, 3)).convert("CMYK"), "JPEG")
    assert (pixels(decode(data)) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    for source in (
        Image.fromarray(values),
        encoded(Image.fromarray(values)),
        encoded(Image.fromarray(values), "TIFF"),
        Image.fromarray(values.astype(np.int32)),
    ):
        assert pixels(decode(source))[0, :, 0].tolist() == expected
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert (pixels(decode(Image.fromarray(every)))[..., 0] == np.rint(every / 65535 * 255)).all()


def test_16_bit_grey_with_a_transparent_value():
    image = Image.fromarray(np.array([[300, 30000]], np.uint16))
    image.info["transparency"] = 300
    assert pixels(decode(image))[0, :, 0].tolist() == [255, 117]


def test_float_pictures():
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert pixels(decode(unit))[0, :, 0].tolist() == [0, 128, 255]
    bytes_ = Image.fromarray(np.array([[-3.0, 99.6, 300.0]], np.float32))
    assert pixels(decode(bytes_))[0, :, 0].tolist() == [0, 100, 255]
    with pytest.raises(InputError, match="not numbers"):
        decode(Image.fromarray(np.array([[np.nan]], np.float32)))


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(decode(data))[0, 0].tolist() == [255, 0, 0]


def test_missing_file_directory_and_unusable_path(tmp_path):
    with pytest.raises(InputError, match="no picture at"):
        decode(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a directory"):
        decode(tmp_path)
    with pytest.raises(InputError, match="cannot be opened"):
        decode("a\0b")


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_no_picture(data, tmp_path):
    with pytest.raises(InputError, match="not a picture") as caught:
        decode(data)
    assert "PNG" in caught.value.hint
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.png"):
        decode(tmp_path / "x.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_file(form):
    data = encoded(Image.fromarray(noise(64, 64, 3)), form)
    for length in (len(data) // 2, len(data) // 10):
        with pytest.raises(InputError):
            decode(data[:length])


def test_a_file_that_asks_for_all_memory(tmp_path):
    path = tmp_path / "picture.jp2"
    endless = (1).to_bytes(4, "big") + b"jp2h" + (2**62).to_bytes(8, "big")  # a box of so many bytes
    path.write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n" + endless + bytes(8))
    with pytest.raises(InputError, match="takes more memory than there is"):
        decode(path)


@pytest.mark.parametrize("edge", [9_500, 13_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(edge, recwarn):
    with pytest.raises(InputError, match="89,478,485"):
        decode(png_header(edge, edge))
    assert not recwarn.list


def test_our_limit_holds_when_pillows_is_lifted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match="89,478,485"):
        decode(png_header(9_500, 9_500))
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    with pytest.raises(InputError, match="limit of 10"):
        decode(Image.new("L", (11, 1)))


def test_zero_size():
    with pytest.raises(InputError, match="0 x 5"):
        decode(Image.new("RGB", (0, 5)))


def test_a_mode_that_cannot_become_rgb():
    with pytest.raises(InputError, match="mode La"):
        decode(Image.new("La", (2, 2)))


class TestFrames:
    """A video is a folder of pictures, or a picture of several frames."""

    @pytest.fixture(params=["folder", "gif"])
    def video(self, request, tmp_path):
        frames = [Image.new("RGB", (4, 3), (20 * shade, 0, 0)) for shade in range(10)]
        if request.param == "gif":
            frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
            return tmp_path / "film.gif"
        for index, frame in enumerate(frames):
            frame.save(tmp_path / f"frame{index}.png")
        (tmp_path / ".hidden").write_text("not a frame")
        return tmp_path

    @pytest.mark.parametrize(
        ("count", "shades"), [(1, [5]), (2, [2, 7]), (5, [1, 3, 5, 7, 9]), (10, range(10)), (99, range(10))]
    )
    def test_frames_are_evenly_spaced(self, video, count, shades):
        found = decode_frames(video, count)
        assert [frame.getpixel((0, 0))[0] for frame in found] == [20 * shade for shade in shades]
        assert {frame.mode for frame in found} == {"RGB"}

    def test_a_still_is_one_frame(self, tmp_path):
        Image.new("RGB", (4, 3)).save(tmp_path / "still.png")
        assert len(decode_frames(tmp_path / "still.png", 8)) == 1

    def test_what_is_no_video(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="holds no pictures"):
            decode_frames(tmp_path / "empty", 8)
        with pytest.raises(InputError, match="no video at"):
            decode_frames(tmp_path / "nothing", 8)
        (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
        with pytest.raises(InputError, match="not a picture in a known format"):
            decode_frames(tmp_path / "film.mp4", 8)
        with pytest.raises(UsageError, match="Cannot take 0 frames"):
            decode_frames(tmp_path, 0)
