"""With nothing pruned, every supported combination says what transformers says, token for token."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import visprune
from visprune.export import export

NEW = 10

CASES = {
    "clip-full-qwen2": {"strategy": "full", "text": "qwen2", "tied": True},
    "siglip-full-mistral-head-dim": {
        "tower": "siglip",
        "strategy": "full",
        "text": "mistral",
        "head_dim": 20,
    },
    "generates-the-image-token": {"loud_token": 259},
    "qwen3-norms-on-heads": {"text": "Qwen3Config", "head_dim": 16},
    "gemma-scaled-embeddings": {"text": "GemmaConfig", "head_dim": 16},
    "siglip-default-llama": {"tower": "siglip", "kv_heads": 4},
    "last-layer-qwen2-one-kv-head": {"feature_layer": -1, "text": "qwen2", "kv_heads": 1},
    "several-layers-mistral-bf16": {"feature_layer": (-3, -1), "text": "mistral", "dtype": "bfloat16"},
    "positive-layer-llama3-rope": {
        "feature_layer": 2,
        "text_extra": (
            (
                "rope_parameters",
                (
                    ("rope_type", "llama3"),
                    ("rope_theta", 500000.0),
                    ("factor", 8.0),
                    ("low_freq_factor", 1.0),
                    ("high_freq_factor", 4.0),
                    ("original_max_position_embeddings", 64),
                ),
            ),
        ),
    },
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request, checkpoint):
    settings = dict(CASES[request.param])
    return checkpoint(checkpoint.Tiny(**settings))


def conversation(turns):
    messages = []
    for images, text, answer in turns:
        content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def reference(path, images, messages):
    """Greedy tokens by transformers' own processor and generate, in float32."""
    processor = transformers.AutoProcessor.from_pretrained(path, backend="pil")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


def test_same_tokens_as_transformers(case, pictures, tmp_path, request):
    bundle = export(case, method="none", output=tmp_path / "bundle")
    assert bundle.manifest.parity.verified
    with visprune.load(bundle.path) as pipeline:
        one = pipeline.generate(pictures[0], "What?", max_new_tokens=NEW)
        if "generates" in request.node.name:
            assert 259 in one.token_ids
        assert one.token_ids == reference(case, pictures[:1], conversation([(1, "What?", None)]))
        two = pipeline.generate(pictures[1:], "And these?", max_new_tokens=NEW)
        assert two.token_ids == reference(case, pictures[1:], conversation([(2, "And these?", None)]))
        none = pipeline.generate([], "No picture.", max_new_tokens=NEW)
        assert none.token_ids == reference(case, [], conversation([(0, "No picture.", None)]))


def test_second_turn_is_a_full_conversation(checkpoint, pictures, tmp_path):
    path = checkpoint(checkpoint.Tiny(text="qwen2"))
    bundle = export(path, method="fopru-rank", output=tmp_path / "bundle", verify=False)
    with visprune.load(bundle.path) as pipeline:
        chat = pipeline.chat()
        first = chat.generate("One?", pictures[:1], max_new_tokens=NEW)
        second = chat.generate("Two?", pictures[1:2], max_new_tokens=NEW)
    turns = [(1, "One?", first.text), (1, "Two?", None)]
    assert second.token_ids == reference(path, pictures[:2], conversation(turns))
