"""FoPru at the size of CLIP ViT-L/14-336: the kept set is the one transformers' eager attentions give.

576 tokens to 144. The oracle is NumPy over `output_attentions` of transformers' own eager tower. One method
takes the tower whole; the other differs from it behind the tower, and has one of fewer layers.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import visprune
from visprune.export import export

SIDE, KEEP = 24, 144
LAYERS = {"fopru-rank": 24, "fopru-row": 4}


@pytest.fixture
def large(checkpoint, tmp_path_factory, method):
    """A checkpoint with a tower of full width and a tiny decoder, random weights."""
    path = tmp_path_factory.mktemp("large")
    tiny = checkpoint(checkpoint.Tiny())
    config = transformers.LlavaConfig.from_pretrained(tiny)
    config.vision_config = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=LAYERS[method],
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
        initializer_factor=3.0,  # attention of an untrained tower is nearly flat; this gives it structure
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(path)
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    processor = transformers.LlavaProcessor(
        image_processor,
        transformers.AutoTokenizer.from_pretrained(tiny),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(path)
    return path


@pytest.fixture
def scores(large, pictures):
    """Attention received by each patch, from transformers' eager tower alone."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        large, attn_implementation="eager"
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(large, backend="pil")
    pixels = processor.image_processor(pictures[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        attention = model.model.vision_tower(pixels, output_attentions=True).attentions[-2][0]
    mean = attention.numpy().astype(np.float64).mean(axis=0)[1:, 1:]
    return mean.mean(axis=0)


@pytest.mark.parametrize("method", LAYERS)
def test_kept_set(method, large, scores, pictures, tmp_path):
    bundle = export(large, method=method, keep_tokens=KEEP, output=tmp_path / "bundle", verify=False)
    with visprune.load(bundle.path) as pipeline:
        answer = pipeline.generate(pictures[0], "?", max_new_tokens=1)
    if method == "fopru-rank":
        order = np.argsort(-scores)
        want, value, cut = order[:KEEP], scores, KEEP
    else:
        value, cut = scores.reshape(SIDE, SIDE).sum(axis=1), KEEP // SIDE
        order = np.argsort(-value)
        want = (order[:cut, None] * SIDE + np.arange(SIDE)).ravel()
    assert value[order[cut - 1]] > value[order[cut]] * (1 + 1e-6), "a tie at the cut proves nothing"
    np.testing.assert_array_equal(answer.keep_indices[0], np.sort(want))
    assert (answer.visual_tokens, answer.tokens_kept) == (SIDE * SIDE, KEEP)
