"""One layer of each wide shape becomes TensorRT-RTX engines, without a GPU. All: benchmarks/engines.py."""

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
SHAPES = {"clip-large-qwen2-0.5b": (CLIP_LARGE, QWEN2), "llava-1.5-7b": (CLIP_SMALL, LLAVA_7B)}


@pytest.fixture(scope="module", params=SHAPES)
def wide(request, tmp_path_factory):
    """A bundle of random weights, one layer in its vision encoder and one in its decoder, 576 tokens."""
    vision, text = SHAPES[request.param]
    path = tmp_path_factory.mktemp("wide")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            num_hidden_layers=2,
            image_size=336,
            patch_size=14,
            **vision,  # the last is not exported
        ),
        text_config=text,
        image_token_id=259,
    )
    with torch.device("meta"):  # not transformers' own weights, which take most of a minute
        model = transformers.LlavaForConditionalGeneration(config).half()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(-0.03, 0.03).add_(1.0 if "norm" in name and "weight" in name else 0.0)
    model.save_pretrained(path / "checkpoint")
    tokenizer().save_pretrained(path / "checkpoint")
    write_processor(Tiny(side=24), path / "checkpoint")
    return export(
        path / "checkpoint", method="fopru-rank", target="rtx", verify=False, output=path / "bundle"
    )


@pytest.mark.parametrize("sm", [86, 120])
def test_in_fp16(wide, sm):
    check(wide, wide.manifest.graphs, sm)


@pytest.mark.parametrize(("precision", "sm"), [("int8", 86), ("fp8", 89)])
def test_quantized(precision, sm, wide, tmp_path):
    bundle = quantize(
        wide,
        tmp_path / precision,
        precision=precision,
        calibration=CALIBRATION,
        samples=2,
        ranges="max",
        smooth=False,
        error_budget=math.inf,
        timing=False,
    )
    assert not bundle.manifest.quantization.kept_float
    check(bundle, bundle.manifest.graphs, sm)
