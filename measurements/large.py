"""Time and memory of exporting and running a model of LLaVA-1.5-7B's shapes on a small machine.

    python measurements/large.py --work /tmp/visprune-bench

Makes the checkpoint (random float16 weights in shards of 2 GB, with the tensor names of
llava-hf/llava-1.5-7b-hf) and copies it. Then exports it and answers a question with the bundle, each in a
subprocess. Memory is the peak resident set of the subprocess, mapped files included. It needs 30 GB of disk;
`--layers 2` is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers
from in_child import run
from model import clip_large, tokenizer, write_processor
from PIL import Image
from safetensors.torch import save_file

_SHARD_BYTES = 2 * 10**9
_POOL = 3 * 10**8  # random numbers; the largest tensor has 131e6
_OLD_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def make(path: Path, layers: int) -> Path:
    """Write the checkpoint shard by shard unless it exists, and return its path; weights have seed 0."""
    if (path / "config.json").is_file():
        return path
    text = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    image_token_id = tokenizer().convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config=clip_large(), text_config=text, image_token_id=image_token_id, dtype="float16"
    )
    with torch.device("meta"):
        shapes = transformers.LlavaForConditionalGeneration(config).state_dict()
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    offsets = random.Random(0)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, tensor in shapes.items():
        old = next(old + name.removeprefix(new) for new, old in _OLD_NAMES.items() if name.startswith(new))
        size += 2 * tensor.numel()
        if size > _SHARD_BYTES:
            shards.append({})
            size = 2 * tensor.numel()
        shards[-1][old] = tuple(tensor.shape)
    path.mkdir(parents=True)
    files = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _values(name, shape, pool, offsets) for name, shape in shard.items()}, path / file)
        files |= dict.fromkeys(shard, file)
    index_file = path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    write_processor(path)
    config.save_pretrained(path)  # last, because its presence means that the checkpoint is complete
    return path


def _values(name: str, shape: tuple[int, ...], pool: torch.Tensor, offsets: random.Random) -> torch.Tensor:
    """Return random numbers of a size with which a signal passes many layers; norms are near 1.

    They are a piece of the pool at a random offset, because drawing 7e9 numbers takes minutes.
    """
    count = math.prod(shape)
    begin = offsets.randrange(_POOL - count)
    values = pool[begin : begin + count].reshape(shape).clone()
    return values.add_(1.0) if "norm" in name and name.endswith("weight") else values


def export_side(checkpoint: Path, output: Path, *, pickled_weights: bool = False) -> None:
    """Export with a self-check layer by layer, which the export of a rehearsal would not choose itself."""
    from visprune.export import export

    export(
        checkpoint,
        method="fopru-rank",
        ratio=0.25,
        dtype="fp16",
        output=output,
        verify="layers",
        pickled_weights=pickled_weights,
    )


def generate_side(output: Path) -> None:
    """Give the first answer after an export: hash the files, and answer a few tokens about an image."""
    import visprune

    picture = Image.linear_gradient("L").convert("RGB")
    with visprune.load(output, low_memory=True) as pipeline:
        answer = pipeline.generate(picture, "What?", max_new_tokens=4)
    first = answer.timings_ms["total"] - answer.timings_ms["decode"]
    print(f"first token {first / 1e3:.1f} s, then {answer.timings_ms['decode_per_token'] / 1e3:.1f} s each")


def size_of(folder: Path, pattern: str) -> int:
    """Return the bytes of the files of a folder that match a pattern."""
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def copied(checkpoint: Path, to: Path) -> float:
    """Copy the checkpoint, and return the seconds until the copy is on the disk."""
    start = time.perf_counter()
    shutil.copytree(checkpoint, to)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(to)
    return seconds


def main() -> None:
    """Run every side in a subprocess; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--side", choices=("export", "generate"))
    args = parser.parse_args()
    checkpoint, output = args.work / f"large-{args.layers}", args.work / "large-export"
    if args.side == "export":
        export_side(checkpoint, output)
        return
    if args.side == "generate":
        generate_side(output)
        return
    make(checkpoint, args.layers)
    shutil.rmtree(output, ignore_errors=True)
    seconds = copied(checkpoint, args.work / "large-copy")
    weights = size_of(checkpoint, "*.safetensors")
    print(f"plain copy        {seconds:7.1f} s                  of {weights / 1e9:.2f} GB", flush=True)
    for side in ("export", "generate"):
        arguments = ("--work", str(args.work), "--layers", str(args.layers), "--side", side)
        done = run(__file__, *arguments, errors=args.work / "stderr.txt")
        if done.failure:
            sys.exit(f"{side} failed: {done.failure}")
        print(f"{side:17s} {done.seconds:7.1f} s   peak {done.peak:5.2f} GB   {done.said}", flush=True)
        if side == "export":
            print(f"export / copy     {done.seconds / seconds:7.2f}", flush=True)
            written = size_of(output, "*.onnx_data")
            print(f"weights           {written / weights:7.4f} of what the checkpoint has", flush=True)
    shutil.rmtree(output)


if __name__ == "__main__":
    main()
