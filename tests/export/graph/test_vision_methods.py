"""Each method before the LLM as exported: what its graphs keep, and what they are made of.

The kept sets are compared with a NumPy reading of each definition, fed with what the exported vision
encoder puts out; whether that is right is compared with PyTorch by the export itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("transformers")
ort = pytest.importorskip("onnxruntime")

from tensorrt_10_3 import problems

from visprune.errors import UnsupportedError
from visprune.export import export
from visprune.pruning.freepruner import FreePruner

DYNAMIC_SHAPE = {"NonZero", "Compress", "Unique", "If", "Loop"}
LAYERS = 3  # of four: the features are the output of the last but one


@dataclass(frozen=True)
class Case:
    """One export. `fused` counts the layers of the tower whose attention stays one operator."""

    name: str
    method: object
    tiny: dict
    target: str
    fused: int
    scans: int


CASES = [
    Case("fastervlm", "fastervlm", {}, "onnxruntime", 3, 0),
    Case("vispruner", "vispruner", {}, "jetpack6", 0, 1),
    Case("divprune", "divprune", {"strategy": "full"}, "onnxruntime", 3, 1),
    Case("freepruner", "freepruner", {"tower": "siglip", "strategy": "full"}, "onnxruntime", 0, 0),
    Case("freepruner", FreePruner("half", "votes", complement="third"), {}, "onnxruntime", 0, 0),
]


def largest(scores, count):
    return np.argsort(-np.asarray(scores), kind="stable")[:count]


def fastervlm(known, keep):
    return largest(known["cls_attention"], keep)


def freepruner(known, keep):
    (degree,) = (value for name, value in known.items() if name.startswith("degree"))
    (attention,) = (value for name, value in known.items() if name.startswith("attention_map"))
    pivots = largest(degree, int(keep / 2 + 0.5))
    looked_at = attention[pivots].sum(0)
    looked_at[pivots] = np.inf
    return largest(looked_at, keep)


def cosines(tokens):
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    return unit @ unit.T


def vispruner(known, keep):
    important = largest(known["cls_attention"], int(keep / 2 + 0.5))
    alive = np.setdiff1d(np.arange(len(known["cls_attention"])), important)
    while keep > len(important) and len(alive) > keep - len(important):
        even, odd = alive[::2], alive[1::2]
        drop = min(len(alive) - (keep - len(important)), -(-len(alive) // 4))
        nearest = cosines(known["features"])[np.ix_(even, odd)].max(1)
        alive = np.setdiff1d(alive, even[largest(nearest, drop)])
    return np.concatenate([important, alive[: keep - len(important)]])


def divprune(known, keep):
    far = 1 - cosines(known["projected"])
    picked = [int(np.argmax((far + 9 * np.eye(len(far))).min(1)))]
    while len(picked) < keep:
        nearest = far[picked].min(0)
        nearest[picked] = -9
        picked.append(int(nearest.argmax()))
    return np.array(picked)


ORACLES = {f.__name__: f for f in (divprune, fastervlm, freepruner, vispruner)}


def every_node(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from every_node(attribute.g)


def session(bundle, name):
    return ort.InferenceSession(bundle.file(bundle.manifest.graphs[name].file))


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.name}-{getattr(case.method, 'combine', '')}-{case.target}"
)
def test_exported_method(case, checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny(tower_layers=LAYERS + 1, **case.tiny))
    bundle = export(path, method=case.method, ratio=0.5, target=case.target, output=tmp_path / "out")
    assert bundle.manifest.parity.verified

    operators = {}
    for name, graph in bundle.manifest.graphs.items():
        model = onnx.load(bundle.file(graph.file), load_external_data=False)
        operators[name] = [node.op_type for node in every_node(model.graph)]
        assert not DYNAMIC_SHAPE & set(operators[name]), name
        if case.target == "jetpack6":
            assert not list(problems(model)), name
    assert operators["vision_encoder"].count("Attention") == case.fused
    assert operators["token_pruner"].count("Scan") == case.scans

    encoder, pruner = session(bundle, "vision_encoder"), session(bundle, "token_pruner")
    tiles, always_kept = 3, bundle.manifest.pruning.always_kept
    kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[encoder.get_inputs()[0].type]
    pixels = np.random.default_rng(0).normal(size=(tiles, 3, 56, 56)).astype(kind)
    names = [output.name for output in encoder.get_outputs()]
    seen = dict(zip(names, encoder.run(None, {"pixel_values": pixels}), strict=True))
    feeds = {"vision_features": seen.pop("image_features"), **seen}
    count = feeds["vision_features"].shape[1] - always_kept

    def run(keep):
        features, indices = pruner.run(None, feeds | {"keep_tokens": np.array(keep)})
        return features.reshape(tiles, always_kept + keep, -1)[:, always_kept:], indices

    projected, every = run(count)
    assert every.tolist() == [list(range(count))] * tiles
    known = {name: value.astype(np.float64) for name, value in seen.items()}
    known["features"] = feeds["vision_features"][:, always_kept:].astype(np.float64)
    known["projected"] = projected.astype(np.float64)
    for keep in (1, 2, 3, 5, count // 2, count - 1):
        features, indices = run(keep)
        for tile in range(tiles):
            of_tile = {name: value[tile] for name, value in known.items()}
            assert indices[tile].tolist() == sorted(ORACLES[case.name](of_tile, keep).tolist())
            kept = projected[tile][indices[tile]].astype(np.float32)
            np.testing.assert_allclose(features[tile], kept, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["fastervlm", "vispruner"])
def test_a_tower_without_a_cls_is_refused_before_anything_is_written(method, checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny(tower="siglip"))
    with pytest.raises(UnsupportedError, match="CLS token"):
        export(path, method=method, ratio=0.5, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
