"""Memory of an export with an adapter, beside that of the plain export of the same model.

    python measurements/adapter.py --work /tmp/visprune-bench

Makes a checkpoint of LLaVA-1.5-7B's shapes with few layers, as `large.py` does, and an adapter with random
weights of rank 64 on all linear layers. Both exports run in turn, each in a subprocess. Memory is the peak
resident set of the subprocess, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median

import torch
from in_child import run
from large import make
from safetensors.torch import save_file

_SIDES = ("plain", "adapter")


def make_adapter(path: Path, checkpoint: Path, rank: int) -> Path:
    """Write an adapter of all linear layers of a checkpoint unless it exists, and return its path; seed 0."""
    from visprune.export.checkpoint.find import find

    settings = path / "adapter_config.json"
    if settings.is_file():
        return path
    torch.manual_seed(0)
    tensors = {}
    for name, tensor in find(checkpoint).tensors.items():
        module = name.removesuffix(".weight")
        linear = module.endswith(("_proj", ".fc1", ".fc2", ".linear_1", ".linear_2"))
        if linear and len(tensor.shape) == 2 and name.endswith(".weight"):
            outputs, inputs = tensor.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = 0.01 * torch.randn(rank, inputs)
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.01 * torch.randn(outputs, rank)
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    settings.write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return path


def export_side(checkpoint: Path, adapter: Path | None, output: Path) -> None:
    """Export in float16 without a self-check, which holds whole parts of the model in memory."""
    from visprune.export import export

    given = [str(adapter)] if adapter is not None else None
    export(
        checkpoint,
        method="fopru-rank",
        ratio=0.25,
        dtype="fp16",
        output=output,
        verify=False,
        force=True,
        adapter=given,
    )


def main() -> None:
    """Run both sides in turn; print a row for each pair, and the median difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="another checkpoint, for a rehearsal")
    parser.add_argument("--side", choices=_SIDES)
    args = parser.parse_args()
    checkpoint = args.checkpoint or args.work / f"large-{args.layers}"
    adapter, output = args.work / f"adapter-{checkpoint.name}-{args.rank}", args.work / "adapter-export"
    if args.side is not None:
        export_side(checkpoint, adapter if args.side == "adapter" else None, output)
        return
    if args.checkpoint is None:
        make(checkpoint, args.layers)
    make_adapter(adapter, checkpoint, args.rank)
    given = ["--work", str(args.work), "--layers", str(args.layers), "--rank", str(args.rank)]
    given += ["--checkpoint", str(args.checkpoint)] if args.checkpoint else []
    differences, ratios = [], []
    for _ in range(args.repeats):
        peaks = []
        for side in _SIDES:
            done = run(__file__, *given, "--side", side, errors=args.work / "stderr.txt")
            if done.failure:
                sys.exit(f"{side} failed: {done.failure}")
            peaks.append(done)
        differences.append(peaks[1].peak - peaks[0].peak)
        ratios.append(peaks[1].seconds / peaks[0].seconds)
        print(
            f"peak {peaks[0].peak:5.2f} GB plain, {peaks[1].peak:5.2f} GB with the adapter: "
            f"{differences[-1]:+.2f} GB   time x {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median {median(differences):+.2f} GB   time x {median(ratios):.2f}")
    shutil.rmtree(output)


if __name__ == "__main__":
    main()
