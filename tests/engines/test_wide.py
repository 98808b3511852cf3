"""One layer of each wide shape becomes TensorRT-RTX engines, without a GPU.

measurements/engines.py builds all layers.
"""

from __future__ import annotations

import math

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import Tiny, tokenizer, write_processor
from rtx_engines import check

from visprune.demo import CALIBRATION
from visprune.export import export
from visprune.quantize import quantize

CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
CLIP_SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
COMMON = {"num_hidden_layers": 1, "vocab_size": 320, "max_position_embeddings": 2048}
QWEN2 = transformers.Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, **COMMON
)
LLAVA_7B = transformers.LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, **COMMON
)
SHAPES = {"clip-large-qwen2-0.5b": (CLIP_LARGE, 24, QWEN2), "llava-1.5-7b": (CLIP_SMALL, 8, LLAVA_7B)}
CASES = [
    ("clip-large-qwen2-0.5b", "fp16", 86),
    ("clip-large-qwen2-0.5b", "fp8", 89),
    ("llava-1.5-7b", "fp16", 120),
    ("llava-1.5-7b", "int8", 86),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A bundle of random weights, one layer in its vision encoder and one in its decoder, made once."""
    made = {}

    def make(shape):
        if shape not in made:
            made[shape] = _export(shape, tmp_path_factory.mktemp("wide"))
        return made[shape]

    return make


def _export(shape, path):
    vision, side, text = SHAPES[shape]
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=14 * side,
            patch_size=14,
            num_hidden_layers=2,  # the last is not exported
            **vision,
        ),
        text_config=text,
        image_token_id=259,
    )
    with torch.device("meta"):  # the random weights of transformers take longer
        model = transformers.LlavaForConditionalGeneration(config).half()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(-0.03, 0.03).add_(1.0 if "norm" in name and "weight" in name else 0.0)
    model.save_pretrained(path / "checkpoint")
    tokenizer().save_pretrained(path / "checkpoint")
    write_processor(Tiny(side=side), path / "checkpoint")
    return export(
        path / "checkpoint", method="fopru-rank", target="rtx", verify=False, output=path / "bundle"
    )


@pytest.mark.parametrize(("shape", "precision", "sm"), CASES)
def test_every_graph_builds(shape, precision, sm, wide, tmp_path):
    bundle = wide(shape)
    if precision != "fp16":
        options = {"calibration": CALIBRATION, "samples": 2, "ranges": "max", "smooth": False}
        options |= {"timing": False, "error_budget": math.inf}  # the weights are random
        bundle = quantize(bundle, tmp_path / "made", precision=precision, **options)
        assert not bundle.manifest.quantization.kept_float
    check(bundle, bundle.manifest.graphs, sm)
