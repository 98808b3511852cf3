"""The bundle's graphs in ONNX Runtime GenAI: the tokens are those of `visprune.load`."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import visprune
from visprune.bundle import Bundle
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.preprocess import ImageProcessor

QUESTION, NEXT = "Which shape is shown?", "In which corner is the letter?"
KEEP = 36


@pytest.fixture(scope="module")
def ready(bundle, example):
    """A pruned bundle with the two files that GenAI wants."""
    pytest.importorskip("onnxruntime")
    folder = bundle("fopru-row", ratio=0.25)
    done = example("to_genai", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pixels(ready):
    """pixel_values of a picture, [1, 3, H, W]."""
    config = json.loads((ready / "preprocessor_config.json").read_text("utf-8"))
    return lambda picture: ImageProcessor.from_config(config)(decode(picture))


def encode(folder, text: str, *, first: bool = True) -> list[int]:
    import tokenizers

    text = text.replace("<image>", "<image>" * KEEP)
    return (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        .encode(text, add_special_tokens=first)
        .ids
    )


def test_a_bundle_made_ready_is_still_a_bundle(ready):
    Bundle.open(ready).verify()
    config = json.loads((ready / "genai_config.json").read_text("utf-8"))["model"]
    for part in ("vision", "embedding", "decoder"):
        assert (ready / config[part]["filename"]).is_file()
        assert not {"inputs", "outputs"} & set(config[part])  # the names are GenAI's own


def test_the_vision_graph_is_the_encoder_and_the_pruner(ready, pixels, pictures):
    import onnxruntime as ort

    encoder, pruner, vision = (
        ort.InferenceSession(ready / "onnx" / f"{name}.onnx")
        for name in ("vision_encoder", "token_pruner", "vision")
    )
    keep = np.array(KEEP)
    seen, received = encoder.run(None, {"pixel_values": pixels(pictures[0])})
    wanted = pruner.run(None, {"vision_features": seen, "attention_received": received, "keep_tokens": keep})
    for got, want in zip(
        vision.run(None, {"pixel_values": pixels(pictures[0]), "keep_tokens": keep}), wanted, strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_decoder_in_segments_is_refused(tiny_copy, edit_manifest, example):
    manifest = Bundle.open(tiny_copy).manifest
    graphs = dict(manifest.graphs)
    graphs["decoder_segment_0"] = graphs.pop("decoder_model_merged")
    stages = (*manifest.stages[:-1], replace(manifest.stages[-1], graph="decoder_segment_0"))
    edit_manifest(tiny_copy, None, graphs=graphs, stages=stages)
    done = example("to_genai", tiny_copy)
    assert done.returncode == 1
    assert "cut into segments" in done.stderr
    assert not (tiny_copy / "genai_config.json").exists()


@pytest.mark.parametrize("keep", [None, 144])
def test_it_answers_as_visprune_does_at_any_ratio(keep, ready, pictures, example):
    pytest.importorskip("onnxruntime_genai")
    with visprune.load(ready) as pipeline:
        done = example("run_genai", ready, pictures[0], NEXT, *([keep] if keep else []))
        assert done.returncode == 0, done.stderr
        assert done.stdout == pipeline.generate(pictures[0], NEXT, keep_tokens=keep).text + "\n"


@pytest.fixture(scope="module")
def generate(ready, pixels):
    """Tokens of the turns of a conversation, each (text, pictures); pictures only in the first."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(ready))

    def run(*turns: tuple[str, list]) -> list[tuple[int, ...]]:
        generator = og.Generator(model, og.GeneratorParams(model))
        answers = []
        for index, (text, pictures) in enumerate(turns):
            ids = encode(ready, text, first=index == 0)
            if index == 0:
                inputs = og.NamedTensors()
                inputs["input_ids"] = np.array([ids], np.int32)
                if pictures:
                    inputs["pixel_values"] = np.concatenate([pixels(picture) for picture in pictures])
                    inputs["keep_tokens"] = np.array(KEEP)
                    inputs["num_image_tokens"] = np.array([KEEP * len(pictures)])
                generator.set_inputs(inputs)
            else:
                generator.append_tokens(ids)
            answer = []
            while not generator.is_done():
                generator.generate_next_token()
                answer.append(int(generator.get_next_tokens()[0]))
            answers.append(tuple(answer))
        return answers

    return run


@pytest.mark.parametrize("count", [0, 1, 2])
def test_no_picture_one_and_two(count, ready, pictures, generate):
    with visprune.load(ready) as pipeline:
        answer = pipeline.generate(pictures[:count], QUESTION)
    prompt = "USER: " + "<image>\n" * count + f"{QUESTION} ASSISTANT:"
    assert generate((prompt, pictures[:count])) == [answer.token_ids]


def test_a_later_turn(ready, pictures, generate):
    with visprune.load(ready) as pipeline:
        chat = pipeline.chat()
        first, second = chat.generate(QUESTION, [pictures[0]]), chat.generate(NEXT)
    found = generate(
        (f"USER: <image>\n{QUESTION} ASSISTANT:", [pictures[0]]), (f"USER: {NEXT} ASSISTANT:", [])
    )
    assert found == [first.token_ids, second.token_ids]
