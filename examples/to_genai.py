"""Prepare a bundle for ONNX Runtime GenAI: `python examples/to_genai.py demo`.

Two files are added to the bundle, and none is changed. `onnx/vision.onnx` joins the vision encoder and the
pruner in one graph, because GenAI runs a single graph from pixels to the visual tokens of the prompt. It uses
the weights of the bundle. `genai_config.json` names the graphs. It names no tensors, because the bundle's
names are those that GenAI expects.

This script needs visprune and onnx. `run_genai.py`, which runs the result, needs neither.
"""

import json
import sys
from pathlib import Path
from typing import Any

import onnx
from onnx import compose, helper

from visprune.bundle import Bundle
from visprune.errors import UnsupportedError

VISION = "onnx/vision.onnx"


def vision(bundle: Bundle) -> onnx.ModelProto:
    """Join the vision encoder and the pruner.

    pixel_values [T, 3, H, W], keep_tokens [] int64 -> image_features [M, D], keep_indices [T, K].
    """
    encoder, pruner = (
        onnx.load(bundle.file(bundle.manifest.graphs[name].file), load_external_data=False)
        for name in ("vision_encoder", "token_pruner")
    )
    # Both graphs name their inner tensors `val_0` and so on, so those of one get a prefix.
    encoder = compose.add_prefix(encoder, "encoder/", rename_inputs=False)
    stages = {stage.graph: stage for stage in bundle.manifest.stages}
    reads = {value: tensor for tensor, value in stages["token_pruner"].inputs.items()}
    joints = [(f"encoder/{name}", reads[value]) for name, value in stages["vision_encoder"].outputs.items()]
    graph = compose.merge_graphs(encoder.graph, pruner.graph, joints)
    return helper.make_model(graph, opset_imports=encoder.opset_import, ir_version=encoder.ir_version)


def config(bundle: Bundle) -> dict[str, Any]:
    """Return the content of `genai_config.json`."""
    graphs, decoder = bundle.manifest.graphs, bundle.manifest.decoder
    return {
        "model": {
            # GenAI has no type `llava`. Its types for pictures differ mostly in their processors, which are
            # not used here. `gemma3` runs graphs with these names as they are.
            "type": "gemma3",
            "context_length": decoder.context_length,
            "vocab_size": decoder.vocab_size,
            "eos_token_id": list(decoder.eos_token_ids),
            "vision": {"filename": VISION},
            "embedding": {"filename": graphs["embedding"].file},
            "decoder": {
                "filename": graphs["decoder_model_merged"].file,
                "hidden_size": graphs["embedding"].outputs[0].shape[-1],
                "num_hidden_layers": decoder.num_layers,
                "num_key_value_heads": decoder.num_kv_heads,
                "head_size": decoder.head_dim,
            },
        },
        # Each step returns a longer cache, instead of filling a buffer of the greatest length.
        "search": {"max_length": decoder.context_length, "past_present_share_buffer": False},
    }


def main(path: Path) -> None:
    """Add the two files.

    Raises:
        BundleError: There is no bundle, or it is damaged.
        UnsupportedError: The decoder of the bundle is more than one graph.
    """
    bundle = Bundle.open(path)
    if "decoder_model_merged" not in bundle.manifest.graphs:
        raise UnsupportedError(
            "The decoder of this bundle is cut into segments, and GenAI runs one graph.",
            "Export with a method before the language model, without --segments.",
        )
    pruning = bundle.manifest.pruning
    if pruning.needs_text or pruning.resizes:
        raise UnsupportedError(
            f"{pruning.method} needs the question's embeddings or a smaller image, and GenAI gives neither.",
            "Export with another method before the language model.",
        )
    onnx.save(vision(bundle), path / VISION)
    (path / "genai_config.json").write_text(json.dumps(config(bundle), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
