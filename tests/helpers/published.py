"""Checkpoints in the form in which they are published: true configuration fields and old names of weights.

`build` takes the configuration of a published checkpoint, shrunk in what only costs time, and writes random
weights, a tokenizer with the published ids, and the processor files beside them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
CLIP_COLOURS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIGLIP_COLOURS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def shrunk(config: dict, tile: int | None = None) -> dict:
    """The same kinds of everything with small sizes; a tile of `tile` pixels, or of as many as it has."""
    config = copy.deepcopy(config)
    text, vision = config["text_config"], config["vision_config"]
    heads, kv_heads = text.get("num_attention_heads", 32), text.get("num_key_value_heads") or 0
    text |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": min(text.get("num_hidden_layers", 32), 2),
        "num_attention_heads": 4,
        "num_key_value_heads": max(1, 4 * kv_heads // heads) if kv_heads else 4,
        "initializer_range": 0.2,
    }
    if "head_dim" in text:
        text["head_dim"] = 16
    layers = config.get("vision_feature_layer", config.get("vision_feature_layers"))
    few = isinstance(layers, int)
    depth = vision.get("num_hidden_layers", 24)
    vision |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3 if few else depth,
        "num_attention_heads": 2,
    }
    if "projection_dim" in vision:
        vision["projection_dim"] = 16
    if tile is not None:
        old, vision["image_size"] = vision["image_size"], tile
        if "image_grid_pinpoints" in config:
            config["image_grid_pinpoints"] = [
                [edge // old * tile for edge in pair] for pair in config["image_grid_pinpoints"]
            ]
    return config


def tokenizer(config: dict, specials: dict[str, int]):
    """Bytes, then words that no text gives, and special tokens under their published ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    free = (index for index in range(10**9) if index not in specials.values())
    vocabulary = dict(specials)
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = next(free)
    while (index := next(free)) < max(specials.values()):
        vocabulary[f"\u2061{index}"] = index
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return fast


def build(
    path: Path, config: dict, *, seed: int = 0, template: str | None = TEMPLATE, **specials: int
) -> Path:
    """Write a checkpoint.

    Args:
        path: The directory, which is made.
        config: From `shrunk`.
        seed: Of the weights.
        template: Of the chat.
        **specials: More special tokens, without their brackets.
    """
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    text, vision, family = config["text_config"], config["vision_config"], config["model_type"]
    torch.manual_seed(seed)
    known = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config["architectures"][0])(known).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # livelier than the default initialisation
            if "tower" in name or "projector" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in name else 0.0))
    weights = {}
    for name, tensor in model.state_dict().items():
        part = "vision_config" if "vision_tower" in name else "text_config"
        kind = config[part].get("torch_dtype") or config.get("torch_dtype") or "float32"
        old = next((new + name[len(begin) :] for begin, new in OLD_NAMES if name.startswith(begin)), name)
        weights[old] = tensor.to(getattr(torch, kind)).clone()
    if text.get("tie_word_embeddings") or config.get("tie_word_embeddings"):
        del weights["language_model.lm_head.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    image = config["image_token_index"]
    tokens = {"<s>": text.get("bos_token_id") or 1, "</s>": text.get("eos_token_id") or 2, "<image>": image}
    tokens |= {"<video>": config["video_token_index"]} if "video_token_index" in config else {}
    tokens |= {f"<{name}>": index for name, index in specials.items()}
    tokenizer(config, tokens).save(str(path / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    clip = vision["model_type"].startswith("clip")
    size = vision["image_size"]
    square = {"height": size, "width": size}
    names = dict.fromkeys(("llava_next", "llava_next_video"), "LlavaNextImageProcessor")
    names["llava_onevision"] = "LlavaOnevisionImageProcessor"
    name = names.get(family, "CLIPImageProcessor" if clip else "SiglipImageProcessor")
    settings: dict = {"image_processor_type": name, "size": square, "resample": 3, "do_resize": True}
    settings |= CLIP_COLOURS if clip else SIGLIP_COLOURS
    if name.startswith(("CLIP", "LlavaNext")):
        settings |= {"size": {"shortest_edge": size}, "crop_size": square}
    if "image_grid_pinpoints" in config:
        settings["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path
