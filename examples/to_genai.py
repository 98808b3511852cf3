"""Makes a bundle ready for ONNX Runtime GenAI: `python examples/to_genai.py demo`.

Two files are added to the bundle, and none is changed. `onnx/vision.onnx` is the vision encoder and the
pruner in one graph, because GenAI runs one from pixels to what stands in the prompt; it reads the weights
that are there. `genai_config.json` names the graphs and no tensor: the names GenAI expects are the bundle's.

Needs visprune and onnx. What runs the result, `run_genai.py`, needs neither.
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
    """pixel_values [T, 3, H, W], keep_tokens [] int64 -> image_features [M, D], keep_indices [T, K]."""
    encoder, pruner = (
        onnx.load(bundle.file(bundle.manifest.graphs[name].file), load_external_data=False)
        for name in ("vision_encoder", "token_pruner")
    )
    # Both call their inner tensors `val_0` and so on: a prefix keeps them apart.
    encoder = compose.add_prefix(encoder, "encoder/", rename_inputs=False)
    stages = {stage.graph: stage for stage in bundle.manifest.stages}
    reads = {value: tensor for tensor, value in stages["token_pruner"].inputs.items()}
    joints = [(f"encoder/{name}", reads[value]) for name, value in stages["vision_encoder"].outputs.items()]
    graph = compose.merge_graphs(encoder.graph, pruner.graph, joints)
    return helper.make_model(graph, opset_imports=encoder.opset_import, ir_version=encoder.ir_version)


def config(bundle: Bundle) -> dict[str, Any]:
    """What `genai_config.json` holds."""
    graphs, decoder = bundle.manifest.graphs, bundle.manifest.decoder
    return {
        "model": {
            # GenAI has no type `llava`. Its types for pictures differ in their processors, which are not used
            # here, and some in more; this one runs graphs of these names as they are.
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
        # Each step puts out a longer cache, and does not fill a buffer of the greatest length.
        "search": {"max_length": decoder.context_length, "past_present_share_buffer": False},
    }


def main(path: Path) -> None:
    """Adds the two files.

    Raises:
        BundleError: There is no bundle, or a damaged one.
        UnsupportedError: Its decoder is more than one graph.
    """
    bundle = Bundle.open(path)
    if "decoder_model_merged" not in bundle.manifest.graphs:
        raise UnsupportedError(
            "The decoder of this bundle is cut into segments, and GenAI runs one graph.",
            "Export with a method before the language model, without --segments.",
        )
    onnx.save(vision(bundle), path / VISION)
    (path / "genai_config.json").write_text(json.dumps(config(bundle), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
