"""Where the settings of a video's frames are taken from: transformers is the oracle."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

transformers = pytest.importorskip("transformers")

from visprune.export.checkpoint.find import find
from visprune.export.checkpoint.loading import load_config
from visprune.export.checkpoint.processors import load_processor

FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


@pytest.mark.parametrize("present", [FILES, FILES[1:], FILES[2:], (FILES[0], FILES[2])], ids=len)
@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision"])
def test_the_first_file_that_is_there(family, present, checkpoint, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(checkpoint(checkpoint.Tiny(family=family)), path)
    common = json.loads((path / FILES[2]).read_text())
    for level, name in enumerate(FILES, start=1):
        (path / name).unlink(missing_ok=True)
        settings = common | {"image_mean": [level / 10] * 3}
        if name in present:
            (path / name).write_text(json.dumps({"video_processor": settings} if level == 1 else settings))
    found = find(str(path))
    settings = load_processor(found, load_config(found)).video_processor
    assert settings["video_processor_type"] in (
        "LlavaNextVideoVideoProcessor",
        "LlavaOnevisionVideoProcessor",
    )
    assert settings["image_mean"] == [(1 + FILES.index(present[0])) / 10] * 3
    if importlib.util.find_spec("torchvision"):
        theirs = getattr(transformers, settings["video_processor_type"]).from_pretrained(path)
        assert list(theirs.image_mean) == settings["image_mean"]


@pytest.mark.parametrize("number", [-1, 2**40])
@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision"])
def test_a_placeholder_of_videos_that_no_tokenizer_can_have(family, number, checkpoint, tmp_path):
    """Such a model takes images alone, as one does whose tokenizer lacks the placeholder."""
    path = shutil.copytree(checkpoint(checkpoint.Tiny(family=family)), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"video_token_id": number}))
    found = find(str(path))
    processor = load_processor(found, load_config(found))
    assert (processor.text.video_token_id, processor.video_processor) == (None, None)
