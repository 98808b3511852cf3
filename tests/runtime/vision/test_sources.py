"""What a picture may be given as, and what is said of everything else."""

from __future__ import annotations

import base64
import io
import os
import zipfile
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from PIL import Image

from visprune.errors import InputError
from visprune.runtime.vision.images import decode, decode_frames
from visprune.runtime.vision.sources import as_list, locate

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path)
    return path


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def same(source):
    np.testing.assert_array_equal(np.asarray(decode(source)), PIXELS)


# --- from memory ---


def test_the_bytes_of_a_file(png):
    content = png.read_bytes()
    for source in (content, bytearray(content), memoryview(content), memoryview(bytearray(content))):
        same(source)
    same(memoryview(b"".join(bytes([byte, 0]) for byte in content))[::2])


def test_an_open_file_is_read_from_its_beginning_each_time(png):
    with png.open("rb") as file:
        file.read(7)
        same(file)
        same(file)
        assert not file.closed
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, "PNG")  # which leaves it at its end
    same(content)


def test_an_open_file_that_cannot_be_set_back(png, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(png, "picture.png")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive, archive.open("picture.png") as file:
        same(file)
    receiving, sending = os.pipe()
    os.write(sending, png.read_bytes())
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        same(pipe)


def test_an_array_is_red_green_blue():
    same(PIXELS)
    same(PIXELS[..., ::-1].copy()[..., ::-1])  # as OpenCV's are turned round
    same(np.asfortranarray(PIXELS))
    assert decode(np.full((2, 3, 3), (200, 100, 0), np.uint8)).getpixel((0, 0)) == (200, 100, 0)


def test_an_array_of_two_dimensions_is_grey():
    assert decode(np.full((4, 7), 9, np.uint8)).getpixel((6, 3)) == (9, 9, 9)


def test_an_array_may_change_afterwards():
    array = PIXELS.copy()
    made = decode(array)
    array[:] = 0
    np.testing.assert_array_equal(np.asarray(made), PIXELS)


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (PIXELS.astype(np.float32) / 255, r"float32 \[6, 5, 3\]"),
        (PIXELS.astype(np.int64), r"int64 \[6, 5, 3\]"),
        (PIXELS > 4, r"bool \[6, 5, 3\]"),
        (PIXELS.transpose(2, 0, 1), r"uint8 \[3, 6, 5\]"),
        (PIXELS[None], r"uint8 \[1, 6, 5, 3\]"),
        (np.zeros((6, 5, 4), np.uint8), r"uint8 \[6, 5, 4\]"),
        (np.zeros(6, np.uint8), r"uint8 \[6\]"),
        (np.array(None), r"object \[\]"),
    ],
)
def test_other_arrays_are_refused_with_what_is_taken(array, what):
    with pytest.raises(InputError, match=what) as caught:
        decode(array)
    assert "NumPy array of uint8: [H, W, 3] in the order RGB" in caught.value.hint


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0)])
def test_an_array_without_pixels_is_refused(shape):
    with pytest.raises(InputError, match="has no pixels"):
        decode(np.zeros(shape, np.uint8))


def test_an_array_that_is_too_large_is_refused():
    with pytest.raises(InputError, match="more pixels than the limit"):
        decode(np.broadcast_to(np.uint8(0), (9500, 9500)))


@pytest.mark.parametrize("source", [None, 7, 1.5, {"a": 1}, [PIXELS], object(), Image])
def test_anything_else_is_refused_with_what_is_taken(source):
    with pytest.raises(InputError, match=r"given as .*, which is not supported") as caught:
        decode(source)
    assert "a file opened in binary mode" in caught.value.hint


def test_a_tensor_is_refused_with_what_is_taken():
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"given as torch\.Tensor"):
        decode(torch.zeros(3, 4, 4))


def test_files_that_give_no_picture(png):
    with png.open(encoding="latin-1") as file, pytest.raises(InputError, match="gives str, not bytes"):
        decode(file)
    with pytest.raises(InputError, match=r"cannot be read: .*closed"):
        decode(file)
    with pytest.raises(InputError, match="known format"):
        decode(io.BytesIO(b""))


def test_one_picture_or_several():
    assert as_list(None) == []
    assert as_list("cat.png") == ["cat.png"]
    assert as_list(("a", "b")) == ["a", "b"]
    assert as_list(PIXELS)[0] is PIXELS


# --- URLs ---


@pytest.mark.parametrize(
    "url", ["http://host/a.png", "HTTPS://host/a.png", "ftp://host/a", "s3://bucket/a.png", "file:///a.png"]
)
def test_pictures_are_not_downloaded(url):
    for read in (decode, locate, lambda text: decode_frames(text, 2)):
        with pytest.raises(InputError, match="is a URL, and pictures are not downloaded") as caught:
            read(url)
        assert "Save the picture as a file first" in caught.value.hint
    with pytest.raises(InputError, match="URL made into a path"):
        decode(Path(url)) if not url.startswith("HTTPS") else decode(Path("https:/host"))


def test_data_urls(png):
    content = png.read_bytes()
    url = data_url(content)
    for text in (url, url.rstrip("="), url.replace("data:", "DATA:"), url[:40] + "\n " + url[40:]):
        same(text)
    same(url.replace("+", "%2B").replace("/", "%2F"))
    same(f"data:image/png,{quote_from_bytes(content)}")
    same(f"data:;base64,{base64.b64encode(content).decode()}")
    assert locate(url) == content


def test_an_animation_in_a_data_url():
    film = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (10, 200)]
    frames[0].save(film, "GIF", save_all=True, append_images=frames[1:])
    assert len(decode_frames(data_url(film.getvalue(), "image/gif"), 8)) == 2


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("data:", "holds no data"),
        ("data:image/png;base64", "holds no data"),
        ("data:image/png;base64,", "holds no data"),
        ("data:,", "holds no data"),
        ("data:image/png;base64,????", "is not base64"),
        ("data:image/png;base64,aGk\udce9", "is not base64"),
        ("data:image/png;base64,A", "is not base64"),
        ("data:image/png;base64,aGVsbG8=", "known format"),
        ("data:text/plain,hello", "known format"),
    ],
)
def test_data_urls_that_are_damaged(url, what):
    with pytest.raises(InputError, match=what):
        decode(url)


def test_a_data_url_that_became_a_path(png):
    with pytest.raises(InputError, match="made into a path") as caught:
        decode(Path(data_url(png.read_bytes())))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_videos_that_no_system_has(name):
    with pytest.raises(InputError, match="cannot be opened"):
        decode_frames(name, 2)
