"""Sizes of well-known models, so that a plan for them needs neither a network nor PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from visprune.estimate.planned_model import ModelSizes, UnprunedModel
from visprune.export.models.parts import Features
from visprune.tiling import Tiling
from visprune.work import Shapes

__all__ = ["KNOWN"]

_PATCH = 14  # pixels along a side of a patch, in every tower here


@dataclass(frozen=True, slots=True)
class _Tower:
    """A vision tower.

    Attributes:
        hidden: Hidden size.
        mlp: Size of the MLPs.
        layers: Layers that run: those up to the one that the features come from.
        prefix: Tokens before the patches, 1 for a CLS.
        size: Pixels along a side of its image.
    """

    hidden: int
    mlp: int
    layers: int
    prefix: int
    size: int


@dataclass(frozen=True, slots=True)
class _Llm:
    """A decoder, by the names of its configuration in short."""

    hidden: int
    mlp: int
    layers: int
    kv_heads: int
    vocabulary: int
    context: int
    head_dim: int = 128


_CLIP = _Tower(1024, 4096, 23, 1, 336)
_SIGLIP = _Tower(1152, 4304, 26, 0, 384)
_VICUNA_7B = _Llm(4096, 11008, 32, 32, 32064, 4096)
_VICUNA_13B = _Llm(5120, 13824, 40, 40, 32064, 4096)
_MISTRAL_7B = _Llm(4096, 14336, 32, 8, 32064, 32768)
_QWEN2_05B = _Llm(896, 4864, 24, 2, 152000, 32768, 64)
_QWEN2_7B = _Llm(3584, 18944, 28, 4, 152128, 32768)

_NEXT = Tiling(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), 336, 24)
_ONEVISION = Tiling(
    tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)), 384, 27, 9, "whole"
)


def _known(name: str, tower: _Tower, llm: _Llm, tiling: Tiling | None = None) -> UnprunedModel:
    side = tower.size // _PATCH
    shapes = Shapes(
        vision_hidden_size=tower.hidden,
        vision_intermediate_size=tower.mlp,
        vision_layers=tower.layers,
        vision_tokens=side * side + tower.prefix,
        vision_patches=side * side,
        patch_values=3 * _PATCH * _PATCH,
        projector=((tower.hidden, llm.hidden), (llm.hidden, llm.hidden)),
        hidden_size=llm.hidden,
        intermediate_size=llm.mlp,
        num_layers=llm.layers,
        vocab_size=llm.vocabulary,
    )
    return UnprunedModel(
        ModelSizes(name, shapes, llm.kv_heads, llm.head_dim, llm.context),
        Features((tower.layers,), tower.prefix, tower.prefix, side, tower.size, _PATCH, 3, tiling),
    )


KNOWN = {
    model.sizes.name: model
    for model in (
        _known("llava-hf/llava-1.5-7b-hf", _CLIP, _VICUNA_7B),
        _known("llava-hf/llava-1.5-13b-hf", _CLIP, _VICUNA_13B),
        _known("llava-hf/llava-v1.6-vicuna-7b-hf", _CLIP, _VICUNA_7B, _NEXT),
        _known("llava-hf/llava-v1.6-vicuna-13b-hf", _CLIP, _VICUNA_13B, _NEXT),
        _known("llava-hf/llava-v1.6-mistral-7b-hf", _CLIP, _MISTRAL_7B, _NEXT),
        _known("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP, _QWEN2_05B, _ONEVISION),
        _known("llava-hf/llava-onevision-qwen2-7b-ov-hf", _SIGLIP, _QWEN2_7B, _ONEVISION),
    )
}
"""Unpruned models by their hub ids."""
