"""One check for every family, on tiny random checkpoints: transformers is the oracle.

With nothing pruned, greedy tokens equal `generate`; with a quarter kept, the kept set equals a choice made
with NumPy from transformers' own attention, and greedy tokens those of its decoder on the same tokens.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from oracle import NEW, Oracle
from PIL import Image

import visprune
from visprune.errors import InputError
from visprune.export import export
from visprune.runtime import Video
from visprune.runtime.vision.arrangement import arrange, arrange_video

ALL_GRIDS = tuple((rows, columns) for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4))
LLAMA3 = (
    ("rope_type", "llama3"),
    ("rope_theta", 500000.0),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64),
)
SIGLIP = {"margin": 6, "tower": "siglip", "strategy": "full", "feature_layer": -1, "text": "qwen2"}
LONG = (("max_position_embeddings", 2048),)
FAMILIES = {
    "llava": {},
    "llava-interleave": SIGLIP,
    "llava-next-vicuna": {"family": "llava_next", "kv_heads": 4, "text_extra": LONG},
    "llava-next-mistral": {"family": "llava_next", "text": "mistral", "text_extra": LONG},
    "llava-next-llama3": {"family": "llava_next", "text_extra": (*LONG, ("rope_parameters", LLAMA3))},
    "llava-next-qwen": {"family": "llava_next", "text": "qwen2", "tied": True, "text_extra": LONG},
    "llava-next-siglip": {"family": "llava_next", **SIGLIP, "text_extra": LONG},
    "llava-next-video": {"family": "llava_next_video", "side": 5, "text_extra": LONG},
    "vipllava": {"family": "vipllava", "tower_layers": 4, "feature_layer": (-2, -4, 2)},
    "llava-onevision": {"family": "llava_onevision", **SIGLIP, "pinpoints": ALL_GRIDS, "text_extra": LONG},
    "llava-onevision-resampled": {
        "family": "llava_onevision",
        **SIGLIP,
        "tied": True,
        "pinpoints": ALL_GRIDS,
        "max_tiles": 2,
        "text_extra": LONG,
    },
}
SIZES = {
    "landscape": (90, 130),
    "portrait": (150, 84),
    "panorama": (40, 160),
    "tower": (230, 50),
    "exactly one tile": (56, 56),
    "exactly a pinpoint": (112, 168),
    "a pixel more": (113, 169),
    "a pixel less": (111, 167),
    "like a thread": (3, 400),
}


def picture(size, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=FAMILIES, ids=list(FAMILIES))
def family(request, checkpoint, tmp_path_factory):
    path = checkpoint(checkpoint.Tiny(**FAMILIES[request.param]))
    folder = tmp_path_factory.mktemp("family")
    bundle = export(path, method="fopru-rank", ratio=0.25, output=folder / "bundle")
    assert bundle.manifest.parity.verified
    with visprune.load(bundle.path) as pipeline:
        yield Oracle(path), pipeline


def test_same_tokens_as_transformers(family):
    oracle, pipeline = family
    whole = {"ratio": 1.0, "max_new_tokens": NEW}
    for name, size in SIZES.items():
        image = picture(size)
        got = pipeline.generate(image, "What?", **whole)
        assert got.token_ids == oracle.generate([(1, "What?", None)], [image]), name
        assert got.tokens_kept == got.visual_tokens, name
    two = [picture(SIZES["landscape"], 1), picture(SIZES["tower"], 2)]
    got = pipeline.generate(two, "And these?", **whole)
    assert got.token_ids == oracle.generate([(2, "And these?", None)], two)
    none = pipeline.generate([], "No picture.", max_new_tokens=NEW)
    assert none.token_ids == oracle.answer(oracle.ids([(0, "No picture.", None)], []), {})


def test_later_turns_are_the_whole_conversation(family):
    oracle, pipeline = family
    shown = [picture(SIZES["portrait"], 3), picture(SIZES["landscape"], 4)]
    chat = pipeline.chat(ratio=1.0)
    first = chat.generate("One?", shown[:1], max_new_tokens=NEW)
    second = chat.generate("Two?", max_new_tokens=NEW)
    third = chat.generate("Three?", shown[1:], max_new_tokens=NEW)
    turns = [(1, "One?", first.text), (0, "Two?", None)]
    assert second.token_ids == oracle.generate(turns, shown[:1])
    turns = [*turns[:1], (0, "Two?", second.text), (1, "Three?", None)]
    assert third.token_ids == oracle.generate(turns, shown)


def test_a_video_between_pictures(family):
    oracle, pipeline = family
    frames = [picture((60, 80), seed) for seed in range(3)]
    if oracle.family not in ("llava_onevision", "llava_next_video"):
        with pytest.raises(InputError, match="takes no videos"):
            pipeline.generate(Video(frames), "What?")
        return
    chat = pipeline.chat(ratio=1.0)
    first = chat.generate("What?", [Video(frames)], max_new_tokens=NEW)
    second = chat.generate("And?", [picture(SIZES["landscape"], 3)], max_new_tokens=NEW)
    pixels = np.concatenate([pipeline.loaded.pictures.video(frame) for frame in frames])
    shown = {"pixel_values_videos": torch.from_numpy(pixels)[None]}
    with torch.no_grad():
        length = oracle.model.get_video_features(**shown).pooler_output.shape[1]
    newlines = 1 if oracle.family == "llava_onevision" else 0
    assert first.visual_tokens == length - newlines
    ids = oracle.ids([(0, "<video>\nWhat?", None)], [], length)
    assert first.token_ids == oracle.answer(ids, shown)
    image = [picture(SIZES["landscape"], 3)]
    lengths = [len(features) for features in oracle.features(image)]
    ids = oracle.ids([(0, "<video>\nWhat?", first.text), (1, "And?", None)], lengths, length)
    assert second.token_ids == oracle.answer(ids, shown | oracle.images(image))
    check_a_quarter_of_a_video(oracle, pipeline, Video(frames), torch.from_numpy(pixels))


def check_a_quarter_of_a_video(oracle, pipeline, video, pixels):
    """The kept set is a choice made from transformers' scores, pooled as transformers pools features."""
    got = pipeline.generate(video, "What?", max_new_tokens=NEW)
    scores = torch.from_numpy(oracle.received_in(pixels))[..., None]  # [T, N, 1]
    scores = oracle.pooled(scores)[..., 0].numpy()
    tokens = scores.shape[1]
    rows = [frame * tokens + best(row, max(1, tokens // 4)) for frame, row in enumerate(scores)]
    found = arrange_video(len(pixels), pipeline.manifest.tiling)
    kept = np.sort(found.places.ravel()[list(got.keep_indices[0])])
    assert kept.tolist() == np.concatenate(rows).tolist()
    rows = np.concatenate([*rows, found.newline_places])
    assert got.token_ids == oracle.generate_pruned_video("What?", pixels, rows)


def best(scores, count):
    """Indices of the largest scores, ascending; where the cut falls must be clear."""
    order = np.argsort(-scores, kind="stable")
    if 0 < count < len(order):
        assert scores[order[count - 1]] - scores[order[count]] > 1e-6
    return np.sort(order[:count])


def kept_rows(scores, tiling, size, share=0.25):
    """Rows of the unpruned visual sequence that FoPru-rank keeps of each tile, newlines included."""
    if tiling is None:
        return best(scores[0], int(len(scores[0]) * share))
    found = arrange(size, tiling)
    mixed = (scores.ravel()[found.sources] * found.weights).sum(-1)
    tiles = [np.flatnonzero(places >= 0) for places in found.places]
    rows, count = [found.newline_places], count_for(tiles, share)
    for places, its, tokens in zip(found.places, mixed, tiles, strict=True):
        rows.append(places[tokens[best(its[tokens], min(count, len(tokens)))]])
    return np.sort(np.concatenate(rows))


def count_for(tiles, share):
    """The largest number for each tile with which all keep no more than their share; at least 1."""
    target = int(sum(map(len, tiles)) * share)
    fits = [
        k
        for k in range(1, max(map(len, tiles)) + 1)
        if sum(min(k, len(tokens)) for tokens in tiles) <= target
    ]
    return max(fits, default=1)


def test_a_quarter_kept_is_the_oracles_quarter(family):
    oracle, pipeline = family
    tiling = pipeline.manifest.tiling
    for name, size in SIZES.items():
        image = picture(size, 5)
        got = pipeline.generate(image, "What?", max_new_tokens=NEW)
        rows = kept_rows(oracle.received(image), tiling, size)
        kept = np.array(got.keep_indices[0])
        if tiling is not None:
            found = arrange(size, tiling)
            assert got.visual_tokens == found.visual_tokens
            kept = np.sort(np.concatenate([found.places.ravel()[kept], found.newline_places]))
        assert kept.tolist() == rows.tolist(), name
        assert got.token_ids == oracle.generate_pruned("What?", [image], [rows]), name
