"""The signals of an exported vision encoder are what transformers' own tower computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from visprune.export import export
from visprune.pruning.uniform import Uniform

DEPTH = 4  # layers up to the feature layer, which is the last but one
KEYS = ("keys", "mean_keys", "cls_feature", "cls_attention")
DEGREES = ("degree_mean_all", "degree_mean_half", "degree_votes_all", "degree_votes_half")


@dataclass(frozen=True, slots=True)
class Asking(Uniform):
    """A method that asks for signals, and does not read them."""

    place: ClassVar[str] = "before the LLM"
    names: tuple[str, ...] = KEYS

    @property
    def signals(self):
        return self.names


@dataclass(frozen=True)
class Seen:
    """What transformers' eager tower computes: features with the CLS token, probabilities, the last keys."""

    features: np.ndarray  # [T, n, Dv]
    attention: np.ndarray  # [L, T, H, n, n]
    keys: np.ndarray  # [T, n, H, Dh]


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint(checkpoint.Tiny(tower_layers=DEPTH + 1))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).normal(size=(3, 3, 56, 56)).astype(np.float32)


@pytest.fixture(scope="module")
def seen(path, pixels):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, attn_implementation="eager")
    tower, heads = model.model.vision_tower.eval(), model.config.vision_config.num_attention_heads
    keys = []
    (projection,) = (
        module
        for name, module in tower.named_modules()
        if name.endswith(f"layers.{DEPTH - 1}.self_attn.k_proj")
    )
    projection.register_forward_hook(lambda module, given, made: keys.append(made))
    with torch.no_grad():
        out = tower(torch.from_numpy(pixels), output_attentions=True, output_hidden_states=True)
    return Seen(
        out.hidden_states[-2].numpy(),
        np.stack([attention.double().numpy() for attention in out.attentions[:DEPTH]]),
        keys[0].unflatten(-1, (heads, -1)).numpy(),
    )


def exported(path, names, pixels, folder):
    """Return the values of the signals, and how often each operator stands in the vision encoder."""
    bundle = export(path, method=Asking(names=names), ratio=0.5, output=folder / "out", verify=False)
    file = bundle.file(bundle.manifest.graphs["vision_encoder"].file)
    nodes = [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]
    return dict(
        zip(names, ort.InferenceSession(file).run(list(names), {"pixel_values": pixels}), strict=True)
    ), nodes


def test_keys_and_the_cls_token(path, pixels, seen, tmp_path):
    got, nodes = exported(path, KEYS, pixels, tmp_path)
    assert nodes.count("Attention") == DEPTH  # all layers stay single operators
    patches = seen.keys[:, 1:]
    np.testing.assert_allclose(got["keys"], patches.reshape(*patches.shape[:2], -1), atol=1e-5)
    np.testing.assert_allclose(got["mean_keys"], patches.mean(axis=2), atol=1e-5)
    np.testing.assert_allclose(got["cls_feature"], seen.features[:, 0], atol=1e-5)
    np.testing.assert_allclose(got["cls_attention"], seen.attention[-1][:, :, 0, 1:].mean(axis=1), atol=1e-6)


def test_degrees_over_layers(path, pixels, seen, tmp_path):
    got, _ = exported(path, (*DEGREES, *KEYS), pixels, tmp_path)
    among = seen.attention.mean(axis=2)[:, :, 1:, 1:]  # [L, T, N, N]
    degree = among.sum(axis=2) - among.diagonal(axis1=2, axis2=3)  # [L, T, N]
    q1, q3 = np.percentile(degree, [25, 75], axis=-1, keepdims=True)
    above = degree - (q3 + 1.5 * (q3 - q1))
    assert np.abs(above).min() > 1e-6, "a degree at the fence proves nothing"
    relative = degree / degree.mean(axis=-1, keepdims=True)
    for span, first in (("all", 0), ("half", DEPTH // 2)):
        np.testing.assert_allclose(got[f"degree_mean_{span}"], relative[first:].mean(axis=0), atol=1e-5)
        votes = (above[first:] > 0).sum(axis=0)
        assert votes.any()
        np.testing.assert_array_equal(got[f"degree_votes_{span}"], votes)
    patches = seen.keys[:, 1:]
    np.testing.assert_allclose(got["keys"], patches.reshape(*patches.shape[:2], -1), atol=1e-5)
