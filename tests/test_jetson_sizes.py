"""The table of docs/jetson.md is what its script says, and the script counts as PyTorch does."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "jetson_sizes"


@pytest.fixture(scope="module")
def sizes():
    loader = SourceFileLoader("jetson_sizes", str(SCRIPT))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


def test_the_page_has_the_table():
    table = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("index", range(3))
def test_weights_are_those_of_pytorch(index, sizes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = sizes.MODELS[index]
    tower, clip = model.tower, model.tower is sizes.CLIP
    vision = getattr(transformers, "CLIPVisionConfig" if clip else "SiglipVisionConfig")(
        hidden_size=tower.width,
        intermediate_size=tower.mlp,
        num_hidden_layers=tower.layers,  # no more than run
        num_attention_heads=tower.heads,
        patch_size=14,
        image_size=336 if clip else 384,
        **({} if clip else {"vision_use_head": False}),
    )
    text = [transformers.Qwen2Config, transformers.LlamaConfig, transformers.MistralConfig][index](
        hidden_size=model.width,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        vocab_size=model.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        whole = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
        )
    matrices = {name: p.numel() for name, p in whole.named_parameters() if p.dim() > 1}
    counted = sum(count for name, count in matrices.items() if "position_embedding" not in name)
    assert counted == model.linear() + model.table()
    every = sum(p.numel() for p in whole.parameters())
    assert every == pytest.approx(counted, rel=2e-3)  # what is left out


def test_the_cache_is_what_a_bundle_has(sizes):
    """Of LLaVA-1.5-7B, 0.5 MB a token; NeXT-7B shares keys among four heads."""
    per_token = [model.cache(1.0) / 2 / model.prompt(1.0) for model in sizes.MODELS]
    assert per_token[1:] == [2 * 32 * 32 * 128 * 2, 2 * 32 * 8 * 128 * 2]
