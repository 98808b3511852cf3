"""The exported pruner of a method keeps what its PyTorch form and an independent oracle keep.

Once the inputs are random, of the sizes of CLIP ViT-L/14-336 and Qwen2-0.5B: 576 tokens of width 1024, and of
width 896 behind the projector. Once they are what the demo model's vision tower makes of two pictures. A
method joins by one line in `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnxruntime = pytest.importorskip("onnxruntime")

import merging_oracles
import method_oracles

from visprune.background import BackgroundThread
from visprune.bundled import MODEL_DIR
from visprune.export import models
from visprune.export.exporter import ExportOptions, prepare
from visprune.export.graph import attention, graph_specs, graphs
from visprune.pruning.base import Traits
from visprune.runtime.vision.images import decode
from visprune.runtime.vision.preprocess import ImageProcessor

DEMO = MODEL_DIR.parent

TILES, WORDS = 2, 5
SCENES = (DEMO / "scene.png", DEMO / "calibration" / "scene00.png")


@dataclass(frozen=True)
class Tile:
    """What a method is given of one tile: tokens [N, Dv] and [N, D], signals, and the question [Q, D]."""

    features: np.ndarray
    projected: np.ndarray
    signals: dict[str, np.ndarray]
    question: np.ndarray

    @property
    def among(self) -> range:
        return range(len(self.features))


# An oracle maps a tile and K to the kept indices. That of a merging method returns the indices, the tokens
# before the projector [K, Dv], and the weights [K, N].
CASES: dict[str, Callable[[Tile, int], Any]] = {
    "cdpruner": lambda t, k: method_oracles.cdpruner(t.projected, t.question, k, t.among),
    "dart": lambda t, k: method_oracles.dart(t.projected, t.question, k, t.among),
    "downsample": lambda t, k: merging_oracles.downsample(t.features, k),
    "holov": lambda t, k: method_oracles.holov(t.features, t.signals["cls_attention"], k, t.among),
    "prumerge+": lambda t, k: merging_oracles.prumerge(
        t.features, t.signals["cls_attention"], t.signals["keys"], k
    ),
    "visionzip": lambda t, k: merging_oracles.visionzip(
        t.features, t.signals["cls_attention"], t.signals["mean_keys"], k, cls=t.signals["cls_feature"]
    ),
}


@pytest.fixture(scope="module")
def large(checkpoint):
    """A checkpoint with a vision tower and a projector of full width, and few layers."""
    tower = {"side": 24, "tower_hidden": 1024, "tower_heads": 16, "tower_layers": 2}
    return checkpoint(checkpoint.Tiny(**tower, text="qwen2", hidden=896, heads=14, layers=1))


@pytest.fixture(scope="module", params=CASES)
def method(request):
    return request.param


@pytest.fixture(scope="module", params=["CLIP-L", "demo"])
def graph(request, method, large, tmp_path_factory):
    """The pruner's graph in ONNX Runtime, the same in PyTorch, and the inputs of both by name."""
    folder = tmp_path_factory.mktemp("graph")
    path = large if request.param == "CLIP-L" else MODEL_DIR
    options = ExportOptions(method=method, ratio=0.25, verify=False)
    job, _ = prepare(path, folder / "never", options)
    whole, specs = graph_specs.graph_specs, []

    def pruner_only(*arguments):
        specs[:] = [spec for spec in whole(*arguments) if spec.name == "token_pruner"]
        return specs

    with pytest.MonkeyPatch.context() as patch, BackgroundThread() as background:
        patch.setattr(graph_specs, "graph_specs", pruner_only)
        written = job._write_graphs(folder, background)["token_pruner"]
    session = onnxruntime.InferenceSession(folder / written.file)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    module = specs[0].build(models.family("llava").parts(model)).eval()
    values = given(specs[0].inputs) if path == large else seen(model, job)
    return session, module, job.pruner, values


@torch.no_grad()
def seen(model, job):
    """What the demo's vision tower makes of two pictures, and its embeddings of a question."""
    attention.register()
    parts, names = models.family("llava").parts(model), job.pruner.signals
    parts.tower.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
    encoder = graphs.VisionEncoder(parts, models.tower("clip_vision_model"), job.features, names)
    processor = ImageProcessor.from_config(job.processor.image_processor)
    pixels = np.concatenate([processor(decode(scene)) for scene in SCENES])
    values = dict(zip(("vision_features", *names), encoder(torch.from_numpy(pixels)), strict=True))
    if Traits.of(job.pruner).needs_text:
        ids = job.processor.tokenizer.backend.encode("What is the letter?", add_special_tokens=False).ids
        values["question_embeds"] = model.get_input_embeddings()(torch.tensor([ids]))
    return {name: value.numpy() for name, value in values.items()}


def given(inputs):
    """Random values for each input; what is named attention is a softmax."""
    rng, values = np.random.default_rng(0), {}
    for one in [leaf for item in inputs for leaf in (item if isinstance(item, list) else [item])]:
        shape = (1, WORDS, one.shape[-1]) if one.name == "question_embeds" else (TILES, *one.shape[1:])
        value = rng.normal(size=shape).astype(np.float32)
        if "attention" in one.name:
            value = np.exp(2 * value) / np.exp(2 * value).sum(axis=-1, keepdims=True)
        values[one.name] = value
    del values["keep_tokens"]
    return values


@pytest.mark.parametrize("kept", [0.5, 0.25, 0.11, "one", "all"])
def test_kept_sets(method, graph, kept):
    session, module, pruner, values = graph
    budget = pruner.budget(module.features.layout)
    counts = {"one": 1, "all": budget.visual_tokens}
    keep = counts[kept] if kept in counts else budget.from_ratio(kept)
    feeds = {**values, "keep_tokens": np.array(keep)}
    read = {one.name for one in session.get_inputs()}
    got = dict(
        zip(
            [one.name for one in session.get_outputs()],
            session.run(None, {name: value for name, value in feeds.items() if name in read}),
            strict=True,
        )
    )
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    question = [tensors["question_embeds"]] if "question_embeds" in tensors else []
    signals = [tensors[name] for name in pruner.signals]
    with torch.no_grad():
        want = module(tensors["vision_features"], torch.tensor(keep), question, signals)
        projected = module.projector(tensors["vision_features"]).numpy()
    assert got["keep_indices"].shape == (TILES, keep)
    for value, (name, found) in zip(want, got.items(), strict=True):
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
    oracle = CASES[method]
    for index in range(TILES):
        named = {name: values[name][index] for name in pruner.signals}
        asked = values["question_embeds"][0] if question else np.empty((0, 0))
        answer = oracle(Tile(values["vision_features"][index], projected[index], named, asked), keep)
        indices, *made = answer if isinstance(answer, tuple) else (answer,)
        assert got["keep_indices"][index].tolist() == list(indices)
        if made:
            tokens, weights = made
            with torch.no_grad():
                rows = module.projector(torch.from_numpy(tokens.astype(np.float32))).numpy()
            found = got["image_features"].reshape(TILES, -1, rows.shape[-1])[index]
            np.testing.assert_allclose(found[-keep:], rows, rtol=1e-5, atol=1e-5 * np.abs(rows).max())
            np.testing.assert_allclose(got["merge_weights"][index], weights, atol=1e-6)
