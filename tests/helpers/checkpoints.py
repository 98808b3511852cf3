"""Tiny random LLaVA checkpoints, complete with tokenizer and processor, written to disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

__all__ = ["Tiny", "checkpoint", "config", "pictures", "tokenizer", "write", "write_processor"]

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


_CLASSES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
    "vipllava": "VipLlava",
}
_VIDEOS = ("llava_next_video", "llava_onevision")


@dataclasses.dataclass(frozen=True)
class Tiny:
    """What may vary in a tiny checkpoint; a lively one has norms and biases of its own in the decoder.

    `margin` is pixels beyond the last whole patch. `pinpoints` count tiles; they, `max_tiles` and
    `pooling`, the stride over a video's frames, are for the families that have them.
    """

    family: str = "llava"
    tower: str = "clip"
    text: str = "llama"
    strategy: str = "default"
    feature_layer: int | tuple[int, ...] = -2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    side: int = 4
    margin: int = 0
    tower_layers: int = 3
    tower_hidden: int = 32
    tower_heads: int = 2
    layers: int = 2
    hidden: int = 32
    lively: bool = False
    tied: bool = False
    dtype: str = "float32"
    text_extra: tuple[tuple[str, object], ...] = ()
    loud_token: int | None = None
    pinpoints: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
    max_tiles: int = 9
    pooling: int = 2
    seed: int = 0


def tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ("<pad>", "<s>", "</s>", "<image>", "<video>")
    fast.add_special_tokens([AddedToken(token, special=True) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


def config(tiny: Tiny):
    size = tiny.side * 14 + tiny.margin
    common = {
        "hidden_size": tiny.tower_hidden,
        "intermediate_size": 48,
        "num_hidden_layers": tiny.tower_layers,
        "num_attention_heads": tiny.tower_heads,
        "image_size": size,
        "patch_size": 14,
    }
    if tiny.tower == "clip":
        vision = transformers.CLIPVisionConfig(**common, projection_dim=16)
    else:
        vision = transformers.SiglipVisionConfig(**common, vision_use_head=False)
    kind = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "mistral": "MistralConfig"}.get(
        tiny.text, tiny.text
    )
    text = {
        "hidden_size": tiny.hidden,
        "intermediate_size": 2 * tiny.hidden,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tiny.tied,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if tiny.head_dim:
        text["head_dim"] = tiny.head_dim
    text |= {key: dict(value) if isinstance(value, tuple) else value for key, value in tiny.text_extra}
    layer = tiny.feature_layer
    settings = {
        "vision_config": vision,
        "text_config": getattr(transformers, kind)(**text),
        "image_token_id": 259,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "tie_word_embeddings": tiny.tied,
    }
    if tiny.family != "vipllava":
        settings["vision_feature_select_strategy"] = tiny.strategy
    if tiny.family not in ("llava", "vipllava"):
        settings["image_grid_pinpoints"] = [[size * edge for edge in pair] for pair in tiny.pinpoints]
    if tiny.family == "llava_onevision":
        settings["vision_aspect_ratio"] = f"anyres_max_{tiny.max_tiles}"
    if tiny.family == "llava_next_video":
        settings["spatial_pool_stride"] = tiny.pooling
    if tiny.family in _VIDEOS:
        settings["video_token_id"] = 260
    return getattr(transformers, f"{_CLASSES[tiny.family]}Config")(**settings)


def write(tiny: Tiny, path: Path) -> Path:
    torch.manual_seed(tiny.seed)
    settings = config(tiny)
    model = getattr(transformers, f"{_CLASSES[tiny.family]}ForConditionalGeneration")(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # livelier than the default initialisation
            if "tower" in name or "projector" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in name else 0.0))
            elif tiny.lively and ("norm" in name or "bias" in name):
                parameter.add_(torch.randn_like(parameter) * 0.25)
        if tiny.loud_token is not None:
            model.lm_head.weight[tiny.loud_token] *= 20
    model.to(getattr(torch, tiny.dtype)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    write_processor(tiny, path)
    return path


def write_processor(tiny: Tiny, path: Path) -> None:
    size = tiny.side * 14 + tiny.margin
    square = {"height": size, "width": size}
    if tiny.family in ("llava", "vipllava"):
        name = {"clip": "CLIPImageProcessorPil", "siglip": "SiglipImageProcessorPil"}[tiny.tower]
    else:
        name = f"{_CLASSES[tiny.family].removesuffix('Video')}ImageProcessorPil"
    settings = {"size": {"shortest_edge": size}, "crop_size": square}
    if name.startswith(("Siglip", "LlavaOnevision")):
        settings = {"size": square}
    if tiny.family not in ("llava", "vipllava"):
        settings["image_grid_pinpoints"] = config(tiny).image_grid_pinpoints
    image_processor = getattr(transformers, name)(**settings)
    if tiny.family in _VIDEOS:  # their processor classes cannot be made without torchvision
        image_processor.save_pretrained(path)
        video = json.loads(image_processor.to_json_string())
        del video["image_processor_type"], video["image_grid_pinpoints"]  # as in older checkpoints
        (path / "video_preprocessor_config.json").write_text(json.dumps(video))
        return
    processor = getattr(transformers, f"{_CLASSES[tiny.family].removeprefix('Vip')}Processor")(
        image_processor=image_processor,
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy=tiny.strategy,
        chat_template=TEMPLATE,
        num_additional_image_tokens=1 if tiny.tower == "clip" else 0,
    )
    processor.save_pretrained(path)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Make a tiny checkpoint once for each configuration: `checkpoint(Tiny(...)) -> Path`."""
    made: dict[Tiny, Path] = {}

    def make(tiny: Tiny) -> Path:
        if tiny not in made:
            made[tiny] = write(tiny, tmp_path_factory.mktemp("checkpoint"))
        return made[tiny]

    make.Tiny = Tiny
    return make


@pytest.fixture(scope="session")
def pictures():
    """Three small pictures of different shapes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (40 + 9 * i, 64 - 7 * i, 3), dtype=np.uint8)).resize(
            (90, 70 + i)
        )
        for i in range(3)
    ]
