"""Pictures of several tiles: a choice among all of them, methods inside the LLM, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from PIL import Image

import visprune
from visprune.bundle import Bundle
from visprune.cli import run_command
from visprune.errors import CheckpointError, UnsupportedError, UsageError
from visprune.export import export
from visprune.pruning.uniform import Uniform
from visprune.runtime import Video
from visprune.runtime.vision.arrangement import arrange

LONG = (("max_position_embeddings", 2048),)
NEXT = {"family": "llava_next", "text": "mistral", "text_extra": LONG}
ONEVISION = {
    "family": "llava_onevision",
    "tower": "siglip",
    "strategy": "full",
    "feature_layer": -1,
    "text": "qwen2",
    "text_extra": LONG,
}
NEXT_VIDEO = {"family": "llava_next_video", "text_extra": LONG}
SIZE = (70, 130)


def picture(size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def next_model(checkpoint):
    return checkpoint(checkpoint.Tiny(**NEXT, layers=3))


class Recorded:
    """What one graph gives, as the pipeline runs it."""

    def __init__(self, pipeline, graph, monkeypatch):
        runner, self.calls = pipeline._runners[graph], []
        infer = runner.infer

        def watched(feeds):
            out = infer(feeds)
            self.calls.append({name: value.numpy() for name, value in out.items()})
            return out

        monkeypatch.setattr(runner, "infer", watched)


def kept_of(found, part):
    """Tokens kept of all tiles: equally many of each, together no more than their part."""
    tokens = (found.places >= 0).sum(axis=1)
    sums = [int(np.minimum(count, tokens).sum()) for count in range(1, 17)]
    return max((kept for kept in sums if kept <= tokens.sum() // part), default=sums[0])


def test_a_global_choice_takes_the_best_of_all_tiles(next_model, tmp_path, monkeypatch):
    bundle = export(
        next_model, method="fopru-rank", ratio=0.25, anyres_scope="global", output=tmp_path / "bundle"
    )
    assert bundle.manifest.parity.verified
    assert bundle.manifest.pruning.budget.scope == "image"
    with visprune.load(bundle.path) as pipeline:
        seen = Recorded(pipeline, "vision_encoder", monkeypatch)
        got = pipeline.generate(picture(), "What?", max_new_tokens=2)
        scores = seen.calls[0]["attention_received"].ravel()
        found = arrange(SIZE, bundle.manifest.tiling)
        valid = np.flatnonzero(found.places.ravel() >= 0)
        count = len(valid) // 4
        order = valid[np.argsort(-scores[valid], kind="stable")]
        assert got.keep_indices == (tuple(sorted(order[:count].tolist())),)
        assert (got.tokens_kept, got.visual_tokens) == (count, found.visual_tokens)


def test_a_global_choice_takes_the_best_of_all_frames(checkpoint, tmp_path, monkeypatch, capsys):
    """The scores of a frame are averaged as its features are; the command takes the video as a GIF."""
    path = checkpoint(checkpoint.Tiny(**NEXT_VIDEO))
    options = {"method": "fopru-rank", "ratio": 0.5, "anyres_scope": "global"}
    bundle = export(path, output=tmp_path / "bundle", **options)
    assert [row.note for row in bundle.manifest.parity.rows if "resampled" in row.name] == ["a video"]
    frames = [picture(seed=seed) for seed in range(3)]
    with visprune.load(bundle.path) as pipeline:
        seen = Recorded(pipeline, "vision_encoder", monkeypatch)
        got = pipeline.generate(Video(frames), "What?", max_new_tokens=2)
        scores = seen.calls[0]["attention_received"].reshape(3, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(3, 4)
        slots = np.array([0, 1, 4, 5]) + 16 * np.arange(3)[:, None]  # the upper left of each frame's 4 x 4
        best = np.argsort(-scores.ravel(), kind="stable")[:6]
        assert got.keep_indices == (tuple(sorted(slots.ravel()[best].tolist())),)
        assert (got.tokens_kept, got.visual_tokens) == (6, 12)
    clip = tmp_path / "clip.gif"
    frames[0].save(clip, save_all=True, append_images=frames[1:])
    question = [str(bundle.path), "--video", str(clip), "--frames", "2", "--prompt", "What?"]
    assert run_command("run", question) == 0
    assert "kept 4 of 8 visual tokens in all (50.0%)" in capsys.readouterr().err
    assert run_command("inspect", [str(bundle.path)]) == 0
    assert "frames of a video averaged over 2 x 2 patches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("spatial_pool_mode", "max", UnsupportedError),
        ("spatial_pool_mode", "conv", UnsupportedError),
        ("spatial_pool_stride", 0, CheckpointError),
        ("spatial_pool_stride", 5, CheckpointError),
    ],
)
def test_frames_that_are_pooled_otherwise(key, value, error, checkpoint, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(checkpoint(checkpoint.Tiny(**NEXT_VIDEO)), path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {key: value}))
    with pytest.raises(error, match=repr(value)) as caught:
        export(path, method="none", output=tmp_path / "bundle")
    assert key in caught.value.hint


def test_a_video_alone_in_a_bundle_that_prunes_inside_the_llm(checkpoint, tmp_path, capsys):
    path = checkpoint(checkpoint.Tiny(**NEXT_VIDEO, layers=3))
    export(path, method="fastv", ratio=0.5, output=tmp_path / "bundle", verify=False)
    picture().save(tmp_path / "clip.gif")
    question = [str(tmp_path / "bundle"), "--video", str(tmp_path / "clip.gif"), "--prompt", "What?"]
    assert run_command("run", question) == 0
    assert "kept 2 of 4 visual tokens in all" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_methods_inside_the_llm_see_newline_tokens_too(method, next_model, tmp_path):
    options = {"method": "fopru-rank", "ratio": 0.5, "then": f"{method}:0.5"}
    bundle = export(next_model, output=tmp_path / "bundle", **options)
    assert bundle.manifest.parity.verified
    with visprune.load(bundle.path) as pipeline:
        chat = pipeline.chat()
        first = chat.generate("What?", [picture()], max_new_tokens=4)
        found = arrange(SIZE, bundle.manifest.tiling)
        kept = kept_of(found, 2)
        entering = kept + len(found.newline_places)
        assert first.layer_tokens[0] == entering
        assert first.layer_tokens[-1] == entering // 2
        assert first.tokens_kept <= entering // 2  # newline tokens are not counted
        places = found.places.ravel()[list(first.keep_indices[0])]
        assert (places >= 0).all()
        second = chat.generate("And?", [picture((130, 50), 1)], max_new_tokens=4)
        assert second.visual_tokens == arrange((130, 50), bundle.manifest.tiling).visual_tokens


def test_a_recipe_is_scaled_to_the_tokens_of_a_prompt(next_model, tmp_path):
    recipe = tmp_path / "recipe.json"
    fitted = visprune.fit(next_model, ratio=0.6, samples=3, output=recipe)
    bundle = export(next_model, method="fitprune", recipe=recipe, output=tmp_path / "bundle")
    assert bundle.manifest.parity.verified
    with visprune.load(bundle.path) as pipeline:
        got = pipeline.generate(picture(), "What?", max_new_tokens=2)
        entering = arrange(SIZE, bundle.manifest.tiling).tokens
        assert fitted.visual_tokens != entering
        wanted = bundle.manifest.layer_pruning.budget.kept(entering)
        assert (got.layer_tokens[0], got.layer_tokens[-1]) == (entering, wanted[-1])


def test_2880_tokens_and_more(checkpoint, tmp_path):
    long = (("max_position_embeddings", 4096),)
    path = checkpoint(checkpoint.Tiny(family="llava_next", side=24, text_extra=long))
    bundle = export(path, method="fopru-rank", ratio=0.25, output=tmp_path / "bundle")
    assert bundle.manifest.parity.verified
    image = picture((672, 672))
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(path).eval()
    inputs = transformers.AutoProcessor.from_pretrained(path, backend="pil")(
        text="USER: <image>\nWhat? ASSISTANT:", images=image, return_tensors="pt"
    )
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with visprune.load(bundle.path) as pipeline:
        whole = pipeline.generate(image, "What?", ratio=1.0, max_new_tokens=4)
        assert (whole.visual_tokens, whole.tokens_kept) == (2880, 2880)
        assert whole.tokens_in == inputs["input_ids"].shape[1] > 2928
        assert list(whole.token_ids) == wanted[0, whole.tokens_in :].tolist()
        pruned = pipeline.generate(image, "What?", max_new_tokens=4)
        assert pruned.tokens_kept == 5 * 144


def test_a_count_says_nothing_where_pictures_differ(next_model, tmp_path):
    with pytest.raises(UsageError, match="different numbers of visual tokens"):
        export(next_model, method="fastv", keep_tokens=8, output=tmp_path / "bundle")


@dataclass(frozen=True, slots=True)
class Unaware(Uniform):
    """A method of another package that knows nothing of padding."""

    place: ClassVar[str] = "before the LLM"

    def select(self, features, signals, keep_tokens, layout):
        return super().select(features, signals, keep_tokens, layout)


REFUSED = {
    "one tile": ({}, {"method": "fopru-rank", "anyres_scope": "global"}, UsageError),
    "no scope 'all'": ({}, {"method": "fopru-rank", "anyres_scope": "all"}, UsageError),
    "divprune cannot": (NEXT, {"method": "divprune", "anyres_scope": "global"}, UnsupportedError),
    "fopru-row cannot": (NEXT, {"method": "fopru-row", "anyres_scope": "global"}, UnsupportedError),
    "none cannot": (NEXT, {"method": "none", "anyres_scope": "global"}, UnsupportedError),
    "takes no `valid`": (NEXT, {"method": Unaware()}, UnsupportedError),
    "compares patches with each other": (ONEVISION, {"method": "freepruner"}, UnsupportedError),
    "or of videos": (NEXT_VIDEO, {"method": "freepruner"}, UnsupportedError),
    "CLS": (ONEVISION, {"method": "fastervlm"}, UnsupportedError),
    "'full' of this model": (NEXT | {"strategy": "full"}, {"method": "none"}, UnsupportedError),
    "'default' of this model": (ONEVISION | {"strategy": "default"}, {"method": "none"}, UnsupportedError),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_before_anything_is_written(words, checkpoint, tmp_path):
    settings, options, error = REFUSED[words]
    path = checkpoint(checkpoint.Tiny(**settings))
    with pytest.raises(error, match=words):
        export(path, output=tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "change", "error", "words"),
    [
        ("config.json", {"image_grid_pinpoints": [[56, 100]]}, CheckpointError, "not made of tiles"),
        ("config.json", {"image_grid_pinpoints": [56, 112]}, CheckpointError, "not pairs of numbers"),
        ("config.json", {"image_grid_pinpoints": []}, CheckpointError, "no pinpoint"),
        ("config.json", {"vision_aspect_ratio": "anyres"}, UnsupportedError, "rule for large pictures"),
        (
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[56, 56]]},
            CheckpointError,
            "the model has others",
        ),
    ],
)
def test_configurations_that_make_no_tiles(file, change, error, words, checkpoint, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(checkpoint(checkpoint.Tiny(**ONEVISION)), path)
    settings = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(settings | change))
    with pytest.raises(error, match=words):
        export(path, method="none", output=tmp_path / "bundle", verify=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_commands_say_what_is_kept(next_model, tmp_path, capsys):
    bundle, shown = tmp_path / "bundle", tmp_path / "picture.png"
    picture().save(shown)
    arguments = [
        str(next_model),
        "--method",
        "fopru-rank",
        "--ratio",
        "0.25",
        "-o",
        str(bundle),
        "--no-verify",
    ]
    assert run_command("export", arguments) == 0
    assert "kept 4 of 16 visual tokens, 75% removed (each tile)" in capsys.readouterr().out
    overlay = tmp_path / "kept.png"
    question = [str(bundle), "--image", str(shown), "--prompt", "What?", "--overlay", str(overlay)]
    assert run_command("run", question) == 0
    found = arrange(SIZE, Bundle.open(bundle).manifest.tiling)
    kept = kept_of(found, 4)
    assert f"kept {kept} of {found.visual_tokens} visual tokens in all" in capsys.readouterr().err
    with Image.open(overlay) as drawn:
        assert drawn.width > drawn.height  # the whole picture, and the larger copy beside it
    assert run_command("inspect", [str(bundle)]) == 0
    printed = capsys.readouterr().out
    assert "tiles     the whole picture and 1 x 2, 1 x 3, 2 x 1, 2 x 2, 3 x 1 of 56 pixels" in printed
    assert "88 visual tokens of an image of 112 x 112 pixels" in printed
