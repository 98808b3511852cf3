"""Memory of exporting the same weights from each format: of transformers, LLaVA's original one, and pickles.

    python measurements/formats.py --work /tmp/visprune-bench

Makes a checkpoint of LLaVA-1.5-7B's shapes, as `large.py` does, and writes it again shard by shard under the
names of the original format, as safetensors and as pickles. The exports run in turn, each in a subprocess,
with a self-check layer by layer. Memory is the peak resident set of the subprocess, mapped files included.
Each format of all 32 layers needs 14 GB of disk, and so does the bundle; `--formats` chooses some of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from in_child import run
from large import export_side, make
from model import clip_large, tokenizer
from safetensors.torch import load_file, save_file

_FORMATS = ("transformers", "original", "pickled")
_ORIGINAL_NAMES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.vision_tower.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
}


def rewrite(made: Path, to: Path, *, pickled: bool) -> None:
    """Write a checkpoint in the original format unless it exists, one shard in memory at a time."""
    if (to / "config.json").is_file():
        return
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    files = {}
    for shard in sorted(made.glob("model-*.safetensors")):
        tensors = {_original(name): tensor for name, tensor in load_file(shard).items()}
        name = shard.name
        if pickled:
            name = name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            torch.save(tensors, to / name)
        else:
            save_file(tensors, to / name)
        files |= dict.fromkeys(tensors, name)
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    (to / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    tokenizer().save_pretrained(to)
    tower = to / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(clip_large().to_json_string(use_diff=False))
    text = json.loads((made / "config.json").read_text())["text_config"]
    llava = {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 1024,
        "mm_vision_tower": "tower",
        "image_aspect_ratio": "pad",
    }
    (to / "config.json").write_text(json.dumps(text | llava))


def _original(name: str) -> str:
    return next(new + name.removeprefix(old) for old, new in _ORIGINAL_NAMES.items() if name.startswith(old))


def main() -> None:
    """Run every format in a subprocess; print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--formats", nargs="+", choices=_FORMATS, default=list(_FORMATS))
    parser.add_argument("--side", choices=_FORMATS)
    args = parser.parse_args()
    made, output = args.work / f"large-{args.layers}", args.work / "format-export"
    folders = {name: args.work / f"{name}-{args.layers}" for name in _FORMATS} | {"transformers": made}
    if args.side is not None:
        export_side(folders[args.side], output, pickled_weights=args.side == "pickled")
        return
    make(made, args.layers)
    for name in args.formats:
        if name != "transformers":
            rewrite(made, folders[name], pickled=name == "pickled")
        given = ("--work", str(args.work), "--layers", str(args.layers), "--side", name)
        shutil.rmtree(output, ignore_errors=True)
        done = run(__file__, *given, errors=args.work / "stderr.txt")
        if done.failure:
            sys.exit(f"{name} failed: {done.failure}")
        print(f"{name:12s} peak {done.peak:5.2f} GB   {done.seconds:6.1f} s", flush=True)
    shutil.rmtree(output)


if __name__ == "__main__":
    main()
