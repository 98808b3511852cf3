"""Observed values of a bundle, compared with the hand-made model in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx_ir")

from small_graphs import drawn, model, node, ort

from visprune.quantize.bundle_graphs import serialize
from visprune.quantize.calibration import calibrate, observed_pipeline
from visprune.quantize.observe import add_observations
from visprune.quantize.output_error import OutputError, output_widths, record
from visprune.runtime import load
from visprune.runtime.samples import read_samples


@pytest.fixture
def samples(jsonl):
    return read_samples(jsonl()).usable


@pytest.fixture
def kept_tokens(tiny, samples, oracle):
    """The kept visual tokens of each image, as the projector returns them: [K, D] each."""
    keep = tiny.manifest.pruning.keep_tokens
    with load(tiny.path) as pipeline:
        process = pipeline.loaded.pictures.processor
        return [oracle.features(process(Image.open(sample.image)), keep)[0] for sample in samples]


def test_statistics_come_from_the_tokens_that_are_kept(tiny, samples, oracle, kept_tokens):
    """The projector reads the kept tokens of each image, and no others."""
    found = calibrate(tiny, samples, {"token_pruner": {"kept": 3}}, lambda *_: None)["token_pruner/kept"]
    rows = found.rows.reshape(len(samples), -1, 3)[:, :-1]  # the last token of each run is there twice
    np.testing.assert_allclose(rows @ oracle.w.projector, np.stack(kept_tokens), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.amax, np.abs(rows).max(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(found.mean, np.abs(rows).mean(axis=(0, 1)), rtol=1e-5)


def test_the_decoder_is_seen_with_visual_tokens_and_while_it_decodes(tiny, samples, oracle, kept_tokens):
    seen = []
    watched = {"decoder_model_merged": {"inputs_embeds": 8}}
    with observed_pipeline(tiny, watched, 1000, lambda _, one: seen.append(one["inputs_embeds"])) as pipeline:
        made = pipeline.generate(samples[0].image, samples[0].prompt, max_new_tokens=4)
    assert [one.count for one in seen] == [made.tokens_in] + [1] * (len(made.token_ids) - 1)
    distances = np.abs(seen[0].rows[:, None] - kept_tokens[0]).max(axis=-1).min(axis=0)
    assert distances.max() < 1e-4
    np.testing.assert_allclose(seen[1].rows[0], oracle.w.embedding[made.token_ids[0]], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("most", [1, 8])
def test_rows_are_spread_and_sums_are_of_all(count, most):
    made = model([node("Relu", ["x"], ["y"])], {"x": ["B", "S", 4]}, {"y": ["B", "S", 4]}, {})
    add_observations(made, {"x": 4, "y": 4}, most)
    session = ort.InferenceSession(serialize(made)[0], providers=["CPUExecutionProvider"])
    x = drawn(1, count, 4, seed=3) * 10
    found = dict(zip([one.name for one in session.get_outputs()], session.run(None, {"x": x}), strict=True))
    np.testing.assert_array_equal(found["observed.amax.x"], np.abs(x[0]).max(axis=0))
    np.testing.assert_allclose(found["observed.total.x"], np.abs(x[0]).sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found["observed.amax.y"], np.maximum(x[0], 0).max(axis=0))
    assert found["observed.count.x"] == [count]
    rows = found["observed.rows.x"]
    places = [int(np.flatnonzero((x[0] == row).all(axis=1))[0]) for row in rows]
    assert (places[0], places[-1]) == (0, count - 1)
    assert places[:-1] == sorted(set(places[:-1]))
    assert min(count, most) <= len(rows) <= 2 * most + 2


def test_float16_sums_do_not_overflow():
    made = model([node("Relu", ["x"], ["y"])], {"x": ["S", 2]}, {"y": ["S", 2]}, {}, "float16")
    add_observations(made, {"y": 2}, 4)
    session = ort.InferenceSession(serialize(made)[0], providers=["CPUExecutionProvider"])
    (total,) = session.run(["observed.total.y"], {"x": np.full((500, 2), 60000, np.float16)})
    np.testing.assert_allclose(total, 500 * 60000, rtol=1e-3)


def test_what_is_recorded_of_the_float_bundle(tiny, samples, kept_tokens):
    widths = {name: output_widths(tiny, name) for name in ("token_pruner", "decoder_model_merged")}
    kept, answers = record(tiny, samples[:2], widths, lambda *_: None)
    with load(tiny.path) as pipeline:
        made = [pipeline.generate(one.image, one.prompt, max_new_tokens=16) for one in samples[:2]]
    assert answers == [tuple(one.token_ids) for one in made]
    for output, feature in zip(kept["token_pruner"].outputs, kept_tokens[:2], strict=True):
        np.testing.assert_allclose(output, feature, rtol=1e-4, atol=1e-5)
    decoder = kept["decoder_model_merged"]
    assert len(decoder.feeds) == len(decoder.outputs) == len(decoder.layers) == 2
    assert [feeds["inputs_embeds"].shape[1] for feeds in decoder.feeds] == [one.tokens_in for one in made]
    assert decoder.step["inputs_embeds"].shape == (1, 1, 8)
    assert kept["vision_encoder"].step is None
    assert len(decoder.layers[0]) == len(widths["decoder_model_merged"]) == 7


def test_difference():
    exact, rounded = drawn(5, 7), drawn(5, 7, seed=1)
    both = OutputError()
    for one, other in zip(exact, rounded, strict=True):
        both.add(one, other)
    flat, rough = exact.ravel().astype(float), rounded.ravel().astype(float)
    assert both.relative_l2 == pytest.approx(np.linalg.norm(flat - rough) / np.linalg.norm(flat))
    assert both.cosine == pytest.approx(flat @ rough / np.linalg.norm(flat) / np.linalg.norm(rough))
    assert (OutputError().relative_l2, OutputError().cosine) == (0.0, 1.0)
