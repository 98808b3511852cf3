"""Configurations as published, with small random weights: transformers' greedy tokens, or the right refusal.

The fields are those of checkpoints that people use; what only costs time is smaller.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from oracle import NEW, Oracle
from PIL import Image
from published import build, shrunk

import visprune
from visprune.errors import UnsupportedError
from visprune.export import export
from visprune.export.preview import preview

CLIP_L = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
SO400M = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
CLIP_FEATURES = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
FIVE = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# All grids of at most ten tiles, as LLaVA-OneVision's successors have them.
TWENTY_SEVEN = [[384 * a, 384 * b] for a in range(1, 11) for b in range(1, 11) if a * b <= 10]
THIRTY_SIX = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]

CONFIGS = {
    "llava-1.5-7b": {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": CLIP_L | {"vocab_size": 32000},
        "vocab_size": 32064,
        **CLIP_FEATURES,
    },
    "llama-3-with-a-float32-tower": {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 128257,
        "model_type": "llava",
        "text_config": {
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
            "torch_dtype": "float16",
            "vocab_size": 128320,
        },
        "torch_dtype": "float16",
        "vision_config": CLIP_L | {"torch_dtype": "float32"},
        **CLIP_FEATURES,
    },
    "llava-v1.6-mistral-7b": {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": FIVE,
        "image_token_index": 32000,
        "model_type": "llava_next",
        "text_config": {
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "vision_config": CLIP_L,
        **CLIP_FEATURES,
    },
    "vip-llava-7b": {
        "architectures": ["VipLlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "vipllava",
        "projector_hidden_act": "gelu",
        "projector_layernorm_eps": 1e-05,
        "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "vocab_size": 32064},
        "torch_dtype": "float16",
        "vision_config": CLIP_L,
        "vision_feature_layers": [-2, -5, -8, -11, 6],  # the older name
        "vocab_size": 32064,
    },
    "llava-next-video-7b": {
        "architectures": ["LlavaNextVideoForConditionalGeneration"],
        "image_grid_pinpoints": FIVE,
        "image_token_index": 32001,
        "model_type": "llava_next_video",
        "projector_hidden_act": "gelu",
        "spatial_pool_mode": "average",
        "spatial_pool_out_channels": 1024,
        "spatial_pool_stride": 2,
        "text_config": {
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 2.5, "type": "linear"},
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "torch_dtype": "bfloat16",
        "video_token_index": 32000,
        "vision_config": CLIP_L,
        **CLIP_FEATURES,
    },
    "granite-vision": {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": TWENTY_SEVEN,
        "image_token_index": 49155,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "granite",
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 300000,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "vocab_size": 49156,
        },
        "vision_config": SO400M,
        "vision_feature_layer": [-24, -20, -12, -1],
        "vision_feature_select_strategy": "full",
    },
    "llava-onevision-qwen2-0.5b": {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": THIRTY_SIX,
        "image_token_index": 151646,
        "model_type": "llava_onevision",
        "text_config": {
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 152000,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": 24,
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        "video_token_index": 151647,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": SO400M | {"num_hidden_layers": 26, "vision_use_head": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "llava-interleave-qwen-0.5b": {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 151646,
        "model_type": "llava",
        "text_config": {
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "max_position_embeddings": 32768,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 152000,
        },
        "torch_dtype": "float16",
        "vision_config": SO400M | {"num_hidden_layers": 26, "vision_use_head": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_says_what_transformers_says(name, tmp_path):
    config = CONFIGS[name]
    clip = config["vision_config"]["model_type"].startswith("clip")
    path = build(tmp_path / "model", shrunk(config, tile=56 if clip else 62))
    bundle = export(path, method="fopru-rank", ratio=0.5, output=tmp_path / "bundle")
    assert bundle.manifest.parity.verified
    oracle = Oracle(path)
    if oracle.model.config.text_config.tie_word_embeddings:  # some classes of transformers do not look there
        oracle.model.lm_head.weight = oracle.model.get_input_embeddings().weight
    shapes = [(90, 130)] if "image_grid_pinpoints" not in config else [(90, 130), (400, 4000), (4000, 400)]
    rng = np.random.default_rng(0)
    with visprune.load(bundle.path) as pipeline:
        for shape in shapes:
            picture = Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8))
            got = pipeline.generate(picture, "What?", ratio=1.0, max_new_tokens=NEW)
            assert got.token_ids == oracle.generate([(1, "What?", None)], [picture]), shape
            assert got.tokens_kept == got.visual_tokens


def test_a_tower_of_pixtral_is_refused_by_its_name(tmp_path):
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "llava",
        "text_config": {"model_type": "mistral", "head_dim": 128, "vocab_size": 131072},
        "vision_config": {"model_type": "pixtral", "image_size": 1024, "patch_size": 16, "head_dim": 64},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    path = tmp_path / "pixtral"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file({"language_model.lm_head.weight": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="vision tower 'pixtral' is not supported"):
        preview(path, method="none")
