"""Methods that read the question, and methods that merge, in conversations of exported bundles.

transformers gives the tokens, the attention and the embeddings of the question; NumPy chooses from them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import merging_oracles
import method_oracles
import tokenizers
from oracle import NEW, Oracle
from PIL import Image

import visprune
from visprune.errors import InputError
from visprune.export import export
from visprune.manifest import EMPTY

QUESTIONS = ("What is in the picture?", "Where?", "A")
COUNTS = (3, 9, 15)


def picture(seed=0, size=(56, 56)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint(checkpoint.Tiny(text_extra=(("max_position_embeddings", 2048),)))


@pytest.fixture(scope="module")
def oracle(path):
    return Oracle(path)


@pytest.fixture(scope="module", params=["dart", "cdpruner"])
def asked(request, path, tmp_path_factory):
    bundle = export(path, method=request.param, ratio=0.5, output=tmp_path_factory.mktemp("asked") / "bundle")
    assert bundle.manifest.parity.verified
    with visprune.load(bundle.path) as pipeline:
        yield getattr(method_oracles, request.param), pipeline


def wanted(choose, oracle, question, image, count):
    """Kept tokens by an oracle, from the projected tokens and the question's embeddings of transformers."""
    ids = oracle.tokenizer(question, add_special_tokens=False)["input_ids"]
    embeds = oracle.model.get_input_embeddings()(torch.tensor(ids)).detach().numpy()
    (tokens,) = oracle.features([image])
    return choose(tokens.numpy(), embeds, count, range(len(tokens)))


def test_the_question_chooses(asked, oracle):
    choose, pipeline = asked
    pruning = pipeline.manifest.pruning
    assert pruning.needs_text
    assert not pruning.merges
    seen = set()
    for question in QUESTIONS:
        for count in COUNTS:
            got = pipeline.generate(picture(), question, keep_tokens=count, max_new_tokens=NEW)
            want = wanted(choose, oracle, question, picture(), count)
            assert list(got.keep_indices[0]) == list(want)
            assert got.token_ids == oracle.generate_pruned(question, [picture()], [list(want)])
            seen.add((count, tuple(want)))
    assert len(seen) > len(COUNTS)


def test_each_picture_keeps_the_question_of_its_turn(asked, oracle):
    choose, pipeline = asked
    chat = pipeline.chat(keep_tokens=6)
    first = chat.generate(QUESTIONS[0], [picture(1)], max_new_tokens=2)
    second = chat.generate(QUESTIONS[1], [picture(2), picture(3)], max_new_tokens=2)
    third = chat.generate(QUESTIONS[2], max_new_tokens=2)
    assert list(first.keep_indices[0]) == list(wanted(choose, oracle, QUESTIONS[0], picture(1), 6))
    assert [list(kept) for kept in second.keep_indices] == [
        list(wanted(choose, oracle, QUESTIONS[1], picture(seed), 6)) for seed in (2, 3)
    ]
    assert third.keep_indices == ()
    chat.reset()
    again = chat.generate(QUESTIONS[1], [picture(1)], max_new_tokens=2)
    assert list(again.keep_indices[0]) == list(wanted(choose, oracle, QUESTIONS[1], picture(1), 6))


def test_the_same_picture_with_another_question_is_another_picture(asked):
    pictures = asked[1].loaded.pictures
    one, other = (pictures.make([picture()], [ids])[0] for ids in ((5, 6), (5, 7)))
    assert one.key != other.key
    assert one.key == pictures.make([picture()], [(5, 6)])[0].key


def test_the_program_embeds_the_question_first(asked):
    manifest = asked[1].manifest
    stages = [(stage.graph, stage.when) for stage in manifest.stages[:4]]
    assert ("embedding", "image") in stages[:3]
    asks = next(stage for stage in manifest.stages if stage.graph == "embedding")
    assert asks.inputs == {"input_ids": "question_ids", "image_features": EMPTY}
    assert asks.outputs == {"inputs_embeds": "question_embeds"}


def test_a_question_without_words_is_refused(asked, monkeypatch):
    pipeline = asked[1]
    for empty in ("", "  "):
        with pytest.raises(InputError, match="The prompt is empty"):
            pipeline.generate(picture(), empty)
    backend = tokenizers.Tokenizer.from_str(pipeline.loaded.tokenizer.backend.to_str())
    backend.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("~"), "")
    loaded = replace(pipeline.loaded, tokenizer=replace(pipeline.loaded.tokenizer, backend=backend))
    monkeypatch.setattr(pipeline, "loaded", loaded)
    with pytest.raises(InputError, match="chooses visual tokens by the question, and '~~' has no tokens"):
        pipeline.generate(picture(), "~~")
    assert pipeline.generate([], "No picture.", max_new_tokens=2).keep_indices == ()


def test_tiles_share_one_question(checkpoint, tmp_path):
    long = (("max_position_embeddings", 2048),)
    path = checkpoint(checkpoint.Tiny(family="llava_next", text_extra=long))
    bundle = export(path, method="dart", ratio=0.5, output=tmp_path / "bundle")
    with visprune.load(bundle.path) as pipeline:
        for size in ((56, 56), (90, 130)):
            got = pipeline.generate(picture(0, size), "What?", max_new_tokens=2)
            assert 0.35 < got.tokens_kept / got.visual_tokens <= 0.5


@pytest.fixture(scope="module")
def merged(checkpoint, tmp_path_factory):
    path = checkpoint(checkpoint.Tiny(layers=3))
    bundle = export(path, method="visionzip", then="fastv:0.5", output=tmp_path_factory.mktemp("zip") / "b")
    assert bundle.manifest.pruning.merges
    with visprune.load(bundle.path) as pipeline:
        yield pipeline


@pytest.mark.parametrize("count", [1, 5, 10, 15])
def test_merged_tokens_reach_the_language_model(path, oracle, count, tmp_path):
    bundle = export(path, method="visionzip", ratio=0.5, output=tmp_path / "bundle", verify=False)
    tower = oracle.model.model.vision_tower
    inputs = oracle.images([picture()])
    with torch.no_grad():
        out = tower(**inputs, output_hidden_states=True, output_attentions=True)
        layer = tower.encoder.layers[-2]
        normed = layer.layer_norm1(out.hidden_states[-3])
        keys = layer.self_attn.k_proj(normed).reshape(1, 17, 2, 16).mean(dim=2)[0, 1:]
        attention = out.attentions[-2][0, :, 0, 1:].mean(dim=0)
        features = out.hidden_states[-2][0]
        kept, tokens, weights = merging_oracles.visionzip(
            features[1:].numpy(), attention.numpy(), keys.numpy(), count, cls=features[0].numpy()
        )
        projected = oracle.model.model.multi_modal_projector(torch.from_numpy(tokens).float())
    ids = oracle.ids([(1, "What?", None)], [count])
    with visprune.load(bundle.path) as pipeline:
        got = pipeline.generate(picture(), "What?", keep_tokens=count, max_new_tokens=NEW)
    assert got.token_ids == oracle._answer_with(ids, oracle.image_token, projected)
    assert list(got.keep_indices[0]) == list(kept)
    assert got.keep_indices[0][0] == -1
    went_in = set(np.flatnonzero((np.asarray(weights) > 0).any(axis=0)).tolist())
    assert set(got.merged_indices[0]) == went_in - set(got.keep_indices[0])


def test_a_token_that_leaves_later_takes_its_members_along(merged):
    whole = merged.generate(picture(), "What?", ratio=1.0, max_new_tokens=2)
    assert whole.merged_indices == ((),)
    assert len(whole.keep_indices[0]) == 8  # fastv's half
    half = merged.generate(picture(), "What?", keep_tokens=8, max_new_tokens=2)
    assert len(half.keep_indices[0]) == 4
    assert not set(half.merged_indices[0]) & set(half.keep_indices[0])
    drawn = merged.overlay(picture(), half.keep_indices[0], merged_indices=half.merged_indices[0])
    assert drawn.size == (504, 504)
