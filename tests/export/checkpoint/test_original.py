"""Checkpoints in LLaVA's original format: the answers of transformers, on pixels that Pillow makes too.

The checkpoints are written by `original`, which shares no code with the translation. Greedy tokens must equal
those of transformers' `generate` on the pixels and the token ids of the bundle. The pixels must equal an
independent reading of what LLaVA's own code does with a picture.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("sentencepiece")

from oracle import NEW
from original import Original, write
from original_files import ROWS
from PIL import Image

import visprune
from visprune.errors import InputError
from visprune.export import export
from visprune.runtime import Video
from visprune.runtime.messages import Message
from visprune.runtime.prompts import prompt_ids

FORMS = {
    "llava-v1.5": Original(inside=False),
    "llava-v1.6-llama3": Original("llava_llama", "anyres", llama3=True, dtype="bfloat16"),
    "llava-v1.6-mistral": Original("llava_mistral", "anyres"),
    "llava-onevision": Original("llava_qwen", "anyres_max_9", siglip=True, tied=True, pinpoints_as_text=True),
    "llava-interleave": Original("llava_qwen", siglip=True, inside=False, storage="shards"),
}
SIZES = {
    "landscape": (90, 131),  # (height, width), with a difference that is odd
    "portrait": (150, 84),
    "1:4": (40, 160),
    "4:1": (200, 50),
    "square": (70, 70),
}
# int(mean * 255) of the colours that the towers were trained with
GREY = {"CLIP": (122, 116, 104), "SigLIP": (127, 127, 127)}
MEAN = {"CLIP": (0.48145466, 0.4578275, 0.40821073), "SigLIP": (0.5, 0.5, 0.5)}
DEVIATION = {"CLIP": (0.26862954, 0.26130258, 0.27577711), "SigLIP": (0.5, 0.5, 0.5)}


def picture(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Reference:
    """transformers' model, on the pixels and the token ids of a bundle.

    The bundle's placeholder has no row in the table of embeddings. Here a token that texts do not contain
    takes its place.
    """

    def __init__(self, original, model, loaded):
        self.original, self.model, self.loaded = original, model, loaded
        self.family, self.stand_in = model.config.model_type, model.config.image_token_id
        self.edge = model.config.vision_config.image_size

    def shown(self, images):
        """What the model takes of the pictures of one conversation."""
        tiles = [torch.from_numpy(p.pixels) for p in self.loaded.pictures.make(images)]
        if self.family == "llava":
            return {"pixel_values": torch.cat(tiles)}
        pixels = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)  # [P, T, 3, H, W]
        sizes = torch.tensor([[image.height, image.width] for image in images])
        found = {"pixel_values": pixels, "image_sizes": sizes}
        several = {"batch_num_images": torch.tensor([len(images)])}
        return found | several if self.family == "llava_onevision" else found

    @torch.no_grad()
    def lengths(self, images):
        return [len(one) for one in self.model.get_image_features(**self.shown(images)).pooler_output]

    def ids(self, turns, lengths):
        """The bundle's ids of a conversation of (pictures, prompt, answer)."""
        messages = []
        for count, text, answer in turns:
            messages.append(Message.blank("user", text, images=count))
            messages += [] if answer is None else [Message("assistant", answer)]
        text, left = self.loaded.manifest.text, iter(lengths)
        ids = prompt_ids(messages, self.loaded.template, self.loaded.tokenizer, text, ROWS)
        assert self.stand_in not in ids
        found = []
        for token in ids:
            found += [self.stand_in] * next(left) if token == text.image_token_id else [token]
        return torch.tensor([found])

    @torch.no_grad()
    def answer(self, ids, **shown):
        out = self.model.generate(input_ids=ids, **shown, max_new_tokens=NEW, do_sample=False)
        return tuple(out[0, ids.shape[1] :].tolist())

    def generate(self, turns, images):
        return self.answer(self.ids(turns, self.lengths(images)), **self.shown(images))


@pytest.fixture(scope="module", params=FORMS, ids=list(FORMS))
def form(request, tmp_path_factory):
    """A checkpoint's loaded bundle, and its reference."""
    folder, original = tmp_path_factory.mktemp("original"), FORMS[request.param]
    written = write(folder / request.param, original)
    bundle = export(written.path, method="none", output=folder / "bundle", verify=False)
    with visprune.load(bundle.path) as pipeline:
        yield pipeline, Reference(original, written.model, pipeline.loaded)


def test_greedy_tokens(form):
    pipeline, reference = form
    for name, size in SIZES.items():
        image = picture(size)
        got = pipeline.generate(image, "What is it?", max_new_tokens=NEW)
        assert got.token_ids == reference.generate([(1, "What is it?", None)], [image]), name
        assert got.tokens_kept == got.visual_tokens, name
    two = [picture(SIZES["landscape"], 1), picture(SIZES["4:1"], 2)]
    got = pipeline.generate(two, "And these?", max_new_tokens=NEW)
    assert got.token_ids == reference.generate([(2, "And these?", None)], two)
    none = pipeline.generate([], "No picture.", max_new_tokens=NEW)
    assert none.token_ids == reference.answer(reference.ids([(0, "No picture.", None)], []))


def test_later_turns(form):
    pipeline, reference = form
    shown = [picture(SIZES["portrait"], 3), picture(SIZES["landscape"], 4)]
    chat = pipeline.chat()
    first = chat.generate("One?", shown[:1], max_new_tokens=NEW)
    second = chat.generate("Two?", max_new_tokens=NEW)
    third = chat.generate("Three?", shown[1:], max_new_tokens=NEW)
    turns = [(1, "One?", first.text), (0, "Two?", None)]
    assert second.token_ids == reference.generate(turns, shown[:1])
    turns = [*turns[:1], (0, "Two?", second.text), (1, "Three?", None)]
    assert third.token_ids == reference.generate(turns, shown)


def test_videos_are_those_of_onevision(form):
    pipeline, reference = form
    frames = [picture((60, 80), seed) for seed in range(3)]
    if reference.original.aspect != "anyres_max_9":
        with pytest.raises(InputError, match="takes no videos"):
            pipeline.generate(Video(frames), "What?")
        return
    got = pipeline.generate(Video(frames), "What?", max_new_tokens=NEW)
    pixels = [frame.resize((reference.edge, reference.edge), Image.Resampling.BICUBIC) for frame in frames]
    shown = {"pixel_values_videos": torch.from_numpy(normalised(pixels, "SigLIP"))[None]}
    with torch.no_grad():
        length = reference.model.get_video_features(**shown).pooler_output.shape[1]
    ids = reference.ids([(1, "What?", None)], [length])
    ids[ids == reference.stand_in] = reference.model.config.video_token_id
    assert got.token_ids == reference.answer(ids, **shown)


def test_an_image_token_beyond_the_table(form):
    manifest = (pipeline := form[0]).manifest
    assert manifest.text.image_token_id >= manifest.decoder.vocab_size == ROWS
    assert manifest.decoder.context_length == 2048
    with pytest.raises(InputError, match="<image>"):
        pipeline.generate([], "An <image> that is none.")


# --- pixels ---


def square(image, edge, colours):
    """Pad to a square with the mean colour, the picture in the middle, and resize."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side), GREY[colours])
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded.resize((edge, edge), Image.Resampling.BICUBIC)


def normalised(views, colours):
    """Views as [T, 3, H, W]."""
    levels = np.stack([np.asarray(view) for view in views]).astype(np.float64) / 255
    return ((levels - MEAN[colours]) / DEVIATION[colours]).transpose(0, 3, 1, 2).astype(np.float32)


def tiles(image, edge, grid):
    """The whole picture squeezed into a tile, and the tiles of the best of the sizes (width, height)."""

    def merit(size):
        scale = min(size[0] / image.width, size[1] / image.height)
        seen = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
        return seen, seen - size[0] * size[1]

    width, height = max(grid, key=merit)
    by_width, by_height = width / image.width, height / image.height
    if by_width < by_height:
        fitted = width, min(int(np.ceil(image.height * by_width)), height)
    else:
        fitted = min(int(np.ceil(image.width * by_height)), width), height
    canvas = Image.new("RGB", (width, height))
    place = (width - fitted[0]) // 2, (height - fitted[1]) // 2
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), place)
    corners = [(x, y) for y in range(0, height, edge) for x in range(0, width, edge)]
    whole = image.resize((edge, edge), Image.Resampling.BICUBIC)
    return [whole, *(canvas.crop((x, y, x + edge, y + edge)) for x, y in corners)]


def test_pixels_are_those_of_the_original_code(form):
    pipeline, reference = form
    original, edge = reference.original, reference.edge
    colours = "SigLIP" if original.siglip else "CLIP"
    if original.aspect != "pad":
        grid = [(width, height) for height, width in reference.model.config.image_grid_pinpoints]
    made = pipeline.loaded.pictures.make
    sizes = [*SIZES.values(), (131, 90), (90, 130), (130, 90), (edge, edge + 1), (edge + 1, edge), (300, 299)]
    for size in sizes:
        image = picture(size, 5)
        (got,) = made([image])
        views = [square(image, edge, colours)] if original.aspect == "pad" else tiles(image, edge, grid)
        want = normalised(views, colours)
        assert got.pixels.shape == want.shape, size
        np.testing.assert_allclose(got.pixels, want, rtol=0, atol=1e-5, err_msg=str(size))
    if original.aspect == "anyres_max_9":  # several pictures are padded and not cut
        for image, got in zip(two := [picture((90, 131)), picture((84, 61))], made(two), strict=True):
            want = normalised([square(image, edge, colours)], colours)
            np.testing.assert_allclose(got.pixels, want, rtol=0, atol=1e-5)
