"""Run a bundle in ONNX Runtime GenAI: `python run_genai.py demo scene.png "What is the letter?" [KEEP]`.

Run `to_genai.py` on the bundle first. KEEP is the number of visual tokens to keep; by default it is the one
that the bundle was exported for.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from plain_onnxruntime import input_ids, pixel_values
from tokenizers import Tokenizer


def main(bundle: Path, picture: str, question: str, keep_tokens: int | None = None) -> None:
    """Generate an answer greedily, and print it."""
    manifest = json.loads((bundle / "visprune.json").read_text())
    keep = keep_tokens or manifest["pruning"]["keep_tokens"]
    visual_tokens = keep + manifest["pruning"]["always_kept"]
    ids = input_ids(bundle, manifest["text"]["image_token_id"], question, visual_tokens)
    # GenAI's own processors are not used, because each of them writes the prompt of one model.
    inputs = og.NamedTensors()
    inputs["input_ids"] = np.array([ids], np.int32)
    inputs["pixel_values"] = np.ascontiguousarray(pixel_values(bundle, picture), manifest["dtype"])
    inputs["keep_tokens"] = np.array(keep)
    inputs["num_image_tokens"] = np.array([visual_tokens])

    model = og.Model(str(bundle))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    print(Tokenizer.from_file(str(bundle / "tokenizer.json")).decode(generator.get_sequence(0)[len(ids) :]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
