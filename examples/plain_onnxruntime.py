"""Run a bundle in plain ONNX Runtime: `python plain_onnxruntime.py demo scene.png "What is the letter?"`."""

import json
import re
import sys
from pathlib import Path

import jinja2
import numpy as np
import onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer


def pixel_values(bundle: Path, picture: str) -> np.ndarray:
    """Preprocess a picture as CLIP's image processor does, [1, 3, H, W]."""
    config = json.loads((bundle / "preprocessor_config.json").read_text())
    edge, crop = config["size"]["shortest_edge"], config["crop_size"]["height"]
    image = Image.open(picture).convert("RGB")
    width, height = (int(edge * side / min(image.size)) for side in image.size)
    left, top = (width - crop) // 2, (height - crop) // 2
    image = image.resize((width, height), config["resample"]).crop((left, top, left + crop, top + crop))
    pixels = np.asarray(image) * config["rescale_factor"]
    return ((pixels - config["image_mean"]) / config["image_std"]).transpose(2, 0, 1)[None]


def input_ids(bundle: Path, image_token_id: int, question: str, visual_tokens: int) -> list[int]:
    """Return the token ids of a question about one picture, with a placeholder for each visual token."""
    # The tag `generation` marks answers for training; Jinja2 itself does not know it.
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", (bundle / "chat_template.jinja").read_text())
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(prompt).ids
    return [i for token in ids for i in [token] * (visual_tokens if token == image_token_id else 1)]


if __name__ == "__main__":
    bundle, picture, question = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    manifest = json.loads((bundle / "visprune.json").read_text())
    graphs = ("vision_encoder", "token_pruner", "embedding", "decoder_model_merged")
    encoder, pruner, embedding, decoder = (ort.InferenceSession(bundle / f"onnx/{g}.onnx") for g in graphs)
    seen = encoder.run(None, {"pixel_values": pixel_values(bundle, picture).astype(manifest["dtype"])})[0]
    keep = np.array(manifest["pruning"]["keep_tokens"])  # all tokens, if nothing is pruned
    visual = pruner.run(["image_features"], {"vision_features": seen, "keep_tokens": keep})[0]  # [M, D]
    ids = step = input_ids(bundle, manifest["text"]["image_token_id"], question, len(visual))
    empty = {i.name: (1, i.shape[1], 0, i.shape[3]) for i in decoder.get_inputs() if "past" in i.name}
    cache = {name: np.zeros(shape, manifest["dtype"]) for name, shape in empty.items()}  # [1, Hkv, P, Dh]
    answer: list[int] = []
    while len(answer) < 128 and not set(answer) & set(manifest["decoder"]["eos_token_ids"]):
        embeds = embedding.run(None, {"input_ids": [step], "image_features": visual})[0]  # [1, S, D]
        positions = np.arange(len(ids + answer))[None, -len(step) :]
        logits, *present = decoder.run(None, {"inputs_embeds": embeds, "position_ids": positions, **cache})
        cache = dict(zip(cache, present, strict=True))
        answer.append(int(logits[0, -1].argmax()))
        step, visual = answer[-1:], visual[:0]
    print(Tokenizer.from_file(str(bundle / "tokenizer.json")).decode(answer))
