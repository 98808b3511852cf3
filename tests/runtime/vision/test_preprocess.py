"""Preprocessing against transformers' Pillow-based processors, bit for bit, after our own decoding."""

import io

import numpy as np
import pytest
from PIL import Image

from visprune.errors import InputError, UnsupportedError
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.preprocess import ImageProcessor

CLIP_336 = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
OLD_CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
SMALL = {"shortest_edge": 28}
CONFIGS = {
    "clip-336": CLIP_336,
    "clip-old": OLD_CLIP,
    "clip-defaults": {"image_processor_type": "CLIPImageProcessor"},
    "clip-nulls": {**CLIP_336, "do_resize": None, "do_rescale": None, "do_pad": None, "do_normalize": None},
    "clip-tiny": {**CLIP_336, "size": SMALL, "crop_size": {"height": 28, "width": 28}},
    "clip-larger-crop": {**CLIP_336, "size": SMALL, "crop_size": {"height": 45, "width": 40}},
    "clip-mixed-crop": {**CLIP_336, "size": [31, 60], "crop_size": {"height": 44, "width": 33}},
    "clip-square": {**CLIP_336, "size": {"height": 48, "width": 40}, "do_center_crop": False},
    "clip-square-int": {**CLIP_336, "size": 30, "default_to_square": True, "crop_size": 28},
    "clip-no-resize": {**CLIP_336, "do_resize": False, "crop_size": [50, 30]},
    "clip-no-normalize": {**CLIP_336, "size": SMALL, "do_normalize": False},
    "clip-no-rescale": {**CLIP_336, "size": SMALL, "do_rescale": False},
    "clip-rescale-factor": {**CLIP_336, "size": SMALL, "rescale_factor": 1 / 127.5, "image_std": 0.7},
    **{f"clip-resample-{filter_}": {**CLIP_336, "size": SMALL, "resample": filter_} for filter_ in range(6)},
    "siglip-384": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}},
    "siglip-defaults": {"image_processor_type": "SiglipImageProcessorFast", "do_convert_rgb": None},
    "siglip-crop": {
        "image_processor_type": "SiglipImageProcessor", "size": 32, "do_center_crop": True, "crop_size": 28,
    },
    "llava": {**CLIP_336, "image_processor_type": "LlavaImageProcessor", "size": SMALL, "do_pad": False},
    "llava-pad": {**CLIP_336, "image_processor_type": "LlavaImageProcessorFast", "do_pad": True},
    "llava-pad-no-crop": {
        "image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False, "size": 30,
    },
    "llava-pad-no-normalize": {
        "image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_normalize": False, "size": 30,
        "image_mean": [0.5, 0.25, 0.75],
    },
}  # fmt: skip


def picture(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 7919 + height)
    # Low and high frequencies: a resampling filter shows on both.
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)).resize((width, height))
    noise = rng.integers(-40, 41, (height, width, 3))
    rgb = Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))
    if mode == "RGBA":
        rgb.putalpha(Image.fromarray(rng.integers(0, 256, (height, width)).astype(np.uint8)))
        return rgb
    return rgb.convert(mode)


def through_file(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return through_file(picture(70, 41), "JPEG", exif=exif)


PICTURES = {
    "landscape": lambda: picture(133, 61),
    "landscape-large": lambda: picture(641, 427),
    "portrait": lambda: picture(59, 130),
    "portrait-odd": lambda: picture(401, 603),
    "square": lambda: picture(97, 97),
    "exact": lambda: picture(336, 336),
    "smaller": lambda: picture(20, 17),
    "grey": lambda: picture(64, 50, "L"),
    "bilevel": lambda: picture(64, 50, "1"),
    "palette": lambda: through_file(picture(64, 50, "P"), transparency=3),
    "rgba": lambda: picture(61, 49, "RGBA"),
    "grey-alpha": lambda: picture(61, 49, "RGBA").convert("LA"),
    "cmyk": lambda: through_file(picture(61, 49, "CMYK"), "JPEG"),
    "16-bit": lambda: through_file(
        Image.fromarray(np.random.default_rng(1).integers(0, 65536, (40, 50)).astype(np.uint16))
    ),
    "1x1": lambda: picture(1, 1),
    "strip": lambda: picture(2000, 3),
    "pole": lambda: picture(2, 300),
    "exif-rotated": rotated,
}


def reference(config):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    name = config.get("image_processor_type") or config["feature_extractor_type"]
    classes = {"C": CLIPImageProcessorPil, "L": LlavaImageProcessorPil, "S": SiglipImageProcessorPil}
    return classes[name[0]].from_dict(dict(config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_transformers_bit_for_bit(config):
    theirs, ours = reference(config), ImageProcessor.from_config(config)
    for name, make in PICTURES.items():
        if name == "strip" and config is CLIP_336:
            continue  # ten seconds in transformers, and the same as in clip-old
        image = decode(make())
        expected = theirs(image, return_tensors="np")["pixel_values"].astype(np.float32)
        tensor = ours(image)
        assert tensor.dtype == np.float32
        assert tensor.shape == expected.shape == (1, 3, *ours.output_size), name
        assert (tensor == expected).all(), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output_size_without_transformers(config):
    processor = ImageProcessor.from_config(config)
    seen = processor.crop(decode(picture(53, 31)))
    assert (seen.height, seen.width) == processor.output_size
    assert seen.mode == "RGB"


def test_crop_is_what_the_tensor_holds():
    processor = ImageProcessor.from_config({**CLIP_336, "do_normalize": False, "do_rescale": False})
    image = picture(120, 90)
    assert (processor(image)[0].transpose(1, 2, 0) == np.asarray(processor.crop(image))).all()


def test_a_known_value():
    processor = ImageProcessor.from_config(CONFIGS["siglip-384"])
    assert (processor(Image.new("RGB", (9, 5), (255, 0, 255)))[0, :, 0, 0] == [1, -1, 1]).all()


def test_padding_has_the_mean_colour_and_is_centred():
    processor = ImageProcessor.from_config(
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_resize": False, "crop_size": 5}
    )
    seen = np.asarray(processor.crop(Image.new("RGB", (5, 2), "white")))
    assert seen[:, 0].tolist() == [[122, 116, 104]] + [[255] * 3] * 2 + [[122, 116, 104]] * 2


def test_a_null_takes_the_default_of_its_class():
    given = {"image_processor_type": "CLIPImageProcessor"}
    nulls = dict.fromkeys(("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"))
    assert ImageProcessor.from_config({**given, **nulls}) == ImageProcessor.from_config(given)


def test_a_processor_config_that_nests_it():
    nested = {"processor_class": "LlavaProcessor", "image_processor": CLIP_336}
    assert ImageProcessor.from_config(nested) == ImageProcessor.from_config(CLIP_336)


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Llava", "LlavaNext", "LlavaOnevision"])
def test_every_variant_of_a_class_name(name, suffix):
    ImageProcessor.from_config({"image_processor_type": f"{name}ImageProcessor{suffix}"})


@pytest.mark.parametrize(
    "change",
    [
        {"image_processor_type": "LlavaNextVideoProcessor"},
        {"image_processor_type": None},
        {"size": {"longest_edge": 336}},
        {"size": {"shortest_edge": 28, "longest_edge": 56}},
        {"size": "large"},
        {"size": {"shortest_edge": "28"}},
        {"size": {"shortest_edge": 0}},
        {"size": [1, 2, 3]},
        {"crop_size": {"shortest_edge": 28}},
        {"crop_size": -3},
        {"do_center_crop": False},
        {"do_resize": False, "do_center_crop": False},
        {"do_pad": True},
        {"use_square_size": True},
        {"do_normalize": "yes"},
        {"resample": 9},
        {"resample": "bicubic"},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": [0.5, "x", 0.5]},
        {"image_mean": [0.5, 0.5, 1e308]},
        {"rescale_factor": 10**400},
        {"rescale_factor": float("nan")},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": [1.5, 0.5, 0.5]},
        {"image_processor_type": "SiglipImageProcessor", "do_center_crop": True, "crop_size": None},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": [float("nan")] * 3},
        {"image_processor_type": "LlavaNextImageProcessor", "do_resize": False},
        {"image_processor_type": "LlavaNextImageProcessor", "size": [336, 672]},
        {"image_processor_type": "LlavaNextImageProcessor", "crop_size": [336, 672]},
        {"image_processor_type": "LlavaNextImageProcessor", "do_center_crop": False, "crop_size": 224},
        {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"longest_edge": 336}},
    ],
    ids=str,
)
def test_unsupported_settings(change):
    with pytest.raises(UnsupportedError) as caught:
        ImageProcessor.from_config({**CLIP_336, **change})
    assert "preprocessor_config.json" in caught.value.hint


def test_a_picture_that_would_grow_without_bound():
    with pytest.raises(InputError, match="100000 x 1 "):
        ImageProcessor.from_config(CLIP_336)(Image.new("RGB", (100_000, 1)))
    with pytest.raises(InputError, match="elongated"):
        ImageProcessor.from_config(CONFIGS["llava-pad"])(Image.new("RGB", (1, 20_000)))


def test_an_edge_for_which_pillow_needs_too_much():
    processor = ImageProcessor.from_config(CONFIGS["siglip-384"])
    with pytest.raises(InputError, match="an edge has more than 1,048,576"):
        processor(Image.new("RGB", (2**20 + 1, 1)))


def test_frames_of_a_video_are_torchvisions_to_a_rounding():
    torch = pytest.importorskip("torch")
    processor = ImageProcessor.from_config(
        {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 28, "width": 28}}
    )
    for size in ((61, 40), (28, 28), (300, 17)):
        frame = picture(*size)
        planes = torch.from_numpy(np.asarray(frame).copy()).permute(2, 0, 1)[None].contiguous()
        resized = torch.nn.functional.interpolate(planes, (28, 28), mode="bicubic", antialias=True)
        expected = processor.tensor([Image.fromarray(resized[0].permute(1, 2, 0).numpy())])
        off = abs(processor(frame) - expected) * processor.std[0] * 255  # in levels
        assert off.max() < 2.5
        assert (off > 0.5).mean() < 0.02


@pytest.mark.parametrize("name", ["LlavaNextVideo", "LlavaOnevision"])
@pytest.mark.parametrize(
    "given", [{}, {"size": {"shortest_edge": 56}, "crop_size": 56, "image_mean": [0.2] * 3}]
)
def test_frames_of_a_video_are_transformers_to_a_rounding(name, given):
    pytest.importorskip("torchvision")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = {"do_center_crop": True} | given if given else given
    theirs = getattr(transformers, f"{name}VideoProcessor")(**given)
    ours = ImageProcessor.from_config({"video_processor_type": f"{name}VideoProcessor", **given})
    for size in ((60, 80), (61, 40), (300, 170), (59, 56)):
        frame = picture(*size)
        planes = torch.from_numpy(np.asarray(frame).copy()).permute(2, 0, 1)[None]  # [T, 3, H, W]
        expected = theirs([planes], return_tensors="pt")["pixel_values_videos"][0].numpy()
        off = abs(ours(frame) - expected) * ours.std[0] * 255  # in levels
        assert off.max() < 2.5
        assert (off > 0.5).mean() < 0.02


def test_a_picture_that_was_not_decoded():
    with pytest.raises(InputError, match="mode L"):
        ImageProcessor.from_config(CLIP_336)(Image.new("L", (3, 3)))
