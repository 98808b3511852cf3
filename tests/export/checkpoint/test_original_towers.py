"""Towers that a checkpoint in LLaVA's original format names by a hub id, and the use that it makes of one."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from original import Original, write
from original_files import write_json
from PIL import Image
from safetensors.torch import load_file, save_file

from visprune.errors import CheckpointError
from visprune.export import export
from visprune.export.checkpoint import loading, processors
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.find import find
from visprune.export.graph import weightless
from visprune.export.preview import preview
from visprune.runtime.vision.preprocess import ImageProcessor

ID, COMMIT = "somebody/tiny-clip", "0" * 39 + "1"
CLIP, SIGLIP = "openai/clip-vit-large-patch14", "google/siglip-so400m-patch14-384"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
# As published; one layer of SigLIP is not used.
KNOWN = {
    f"{CLIP}-336": (1024, 4096, 24, 16, 336),
    CLIP: (1024, 4096, 24, 16, 224),
    SIGLIP: (1152, 4304, 26, 16, 384),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty hub's cache, and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loading.silence_transformers()
    return cache


def edit(path, **changes):
    file = path / "config.json"
    write_json(file, json.loads(file.read_text()) | changes)


def image_processor(path):
    checkpoint = find(path)
    found = processors.load_processor(checkpoint, loading.load_config(checkpoint))
    return ImageProcessor.from_config(found.image_processor)


def test_a_tower_in_the_hubs_cache(cache, tmp_path):
    root = cache / f"models--{ID.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    written = write(tmp_path / "model", Original(inside=False), root / "snapshots" / COMMIT)
    edit(written.path, mm_vision_tower=ID)
    assert preview(written.path, method="none", output=tmp_path / "out").model == "model"
    bundle = export(written.path, method="none", output=tmp_path / "out", verify=False)
    (part,) = bundle.manifest.source.parts
    assert (part.role, part.name, part.revision) == ("vision tower", ID, COMMIT)
    edit(written.path, mm_vision_tower="nobody/else")
    (part,) = find(written.path, CheckpointOptions(vision_tower=ID)).parts
    assert (part.name, part.revision) == (ID, COMMIT)
    with pytest.raises(CheckpointError, match=r"nobody/else is not .* dry run") as caught:
        preview(written.path, method="none", output=tmp_path / "dry")
    assert "hf download nobody/else" in caught.value.hint


@pytest.mark.parametrize("name", KNOWN)
def test_towers_that_are_known_by_their_ids(name, tmp_path):
    """Their configuration is needed although the checkpoint holds their weights."""
    siglip, width = name == SIGLIP, KNOWN[name][0]
    written = write(tmp_path / "model", Original("llava_qwen", siglip=siglip))
    edit(written.path, mm_vision_tower=name, mm_hidden_size=width)
    file = written.path / "model.safetensors"
    weights = load_file(file)
    weights["model.mm_projector.0.weight"] = torch.zeros(32, width, dtype=torch.float16)
    patches = "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"
    weights[patches] = torch.zeros(width, 3, 14, 14, dtype=torch.float16)
    save_file(weights, file, {"format": "pt"})
    checkpoint = find(written.path)
    vision = loading.load_config(checkpoint).vision_config
    assert tuple(getattr(vision, key) for key in SIZES) == KNOWN[name]
    assert (vision.patch_size, vision.model_type) == (
        14,
        "siglip_vision_model" if siglip else "clip_vision_model",
    )
    assert vision.hidden_act == ("gelu_pytorch_tanh" if siglip else "quick_gelu")
    made = image_processor(written.path)
    assert made.output_size == (KNOWN[name][-1],) * 2
    assert made.mean == ((0.5,) * 3 if siglip else (0.48145466, 0.4578275, 0.40821073))
    assert made.std == ((0.5,) * 3 if siglip else (0.26862954, 0.26130258, 0.27577711))
    assert (made.resample, made.pad_colour) == (3, (127,) * 3 if siglip else (122, 116, 104))
    with pytest.raises(CheckpointError, match=r"lack \d+ of"):  # it has three layers
        weightless.open_model(checkpoint)


@pytest.mark.parametrize("aspect", ["square", None])
@pytest.mark.parametrize("siglip", [False, True], ids=["CLIP", "SigLIP"])
def test_pictures_that_are_not_padded(siglip, aspect, tmp_path):
    """CLIP's own processor cuts out the middle, and SigLIP's squeezes the picture."""
    written = write(tmp_path / "model", Original("llava_qwen", siglip=siglip))
    edit(written.path, image_aspect_ratio=aspect)
    edge, made = written.model.config.vision_config.image_size, image_processor(written.path)
    for width, height in ((131, 90), (84, 150), (70, 70)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        want = Image.fromarray(pixels)
        short = min(width, height)
        size = (edge, edge) if siglip else (edge * width // short, edge * height // short)
        want = want.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
        want = want.crop((left, top, left + edge, top + edge))
        assert np.array_equal(np.asarray(made.crop(Image.fromarray(pixels))), np.asarray(want))


@pytest.mark.parametrize(
    ("feature", "layer", "strategy"),
    [("patch", -1, "default"), ("cls_patch", -2, "full"), ("patch", 1, "default")],
)
def test_the_features_of_clip_that_the_model_takes(feature, layer, strategy, tmp_path):
    written = write(tmp_path / "model", Original())
    edit(written.path, mm_vision_select_feature=feature, mm_vision_select_layer=layer)
    found = loading.load_config(find(written.path))
    assert (found.vision_feature_layer, found.vision_feature_select_strategy) == (layer, strategy)
