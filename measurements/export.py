"""Time, memory and size of an export against transformers' own ONNX exporter.

    python measurements/export.py --work /tmp/visprune-bench

Each side runs in a subprocess, from the checkpoint on disk to finished files. Memory is the peak resident set
of the subprocess, mapped weight files included.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from in_child import run
from model import make
from PIL import Image

_SIDES = ("visprune", "visprune, no self-check", "transformers OnnxExporter")


def visprune_side(checkpoint: Path, output: Path, *, verify: bool) -> None:
    """Export with visprune."""
    from visprune.export import export

    export(checkpoint, method="fopru-rank", ratio=0.25, output=output, verify=verify)


def transformers_side(checkpoint: Path, output: Path) -> None:
    """Export the vision encoder, prefill and decode graphs with transformers' exporter for generation."""
    import torch
    import transformers
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    picture = Image.fromarray(np.zeros((336, 336, 3), np.uint8))
    inputs = processor(images=picture, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    exported = OnnxExporter().export_for_generation(model, dict(inputs), config=OnnxConfig(dynamic=True))
    exported.save_pretrained(output)


def main() -> None:
    """Run every side in a subprocess; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--side", type=int)
    args = parser.parse_args()
    checkpoint, output = args.work / "checkpoint", args.work / "export"
    if args.side is not None:
        if args.side == 2:
            transformers_side(checkpoint, output)
        else:
            visprune_side(checkpoint, output, verify=args.side == 0)
        return
    make(checkpoint)
    for index, name in enumerate(_SIDES):
        shutil.rmtree(output, ignore_errors=True)
        side = ("--work", str(args.work), "--side", str(index))
        done = run(__file__, *side, errors=args.work / "stderr.txt")
        if done.failure:
            print(f"{name:28s} failed: {done.failure}", flush=True)
            continue
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9
        print(
            f"{name:28s} {done.seconds:6.1f} s   peak {done.peak:5.2f} GB   on disk {size:5.2f} GB",
            flush=True,
        )
    shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
