"""LLaVA-HR's vision tower, written out: timm's ConvNeXt, and plain PyTorch on a dictionary of tensors.

The dictionary has the names of the original checkpoints. Nothing here imports visprune.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.models.convnext import ConvNeXt
from torch.nn import functional as F

__all__ = ["Sizes", "random_tensors", "see"]

FAST = "fast_vision_tower.vision_tower.vision_model."
SLOW = "slow_vision_tower.vision_tower."


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a small tower; `trained` on 24 x 24 patches, as CLIP at 336 pixels is."""

    image: int = 768
    hidden: int = 32
    mlp: int = 48
    heads: int = 4
    layers: int = 8
    depths: tuple[int, ...] = (1, 1, 2, 1)
    widths: tuple[int, ...] = (8, 12, 16, 24)
    slow_eps: float = 1e-6
    adapters: bool = True
    trained: int = 24

    @property
    def side(self):
        return self.image // 32


def convnext(sizes):
    return ConvNeXt(depths=sizes.depths, dims=sizes.widths, num_classes=5, norm_eps=sizes.slow_eps).eval()


def shapes(sizes):
    """Names and shapes of all tensors of the tower, as the original code saves them."""
    d, m, c = sizes.hidden, sizes.mlp, sizes.widths[-1]
    found = {
        FAST + "embeddings.class_embedding": (d,),
        FAST + "embeddings.patch_embedding.weight": (d, 3, 14, 14),
        FAST + "embeddings.position_embedding.weight": (sizes.trained**2 + 1, d),
    }

    def linear(name, inputs, outputs, *kernel):
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs, *kernel), (outputs,)

    def norm(name):
        found[f"{name}.weight"], found[f"{name}.bias"] = (d,), (d,)

    norm(FAST + "pre_layrnorm")
    norm(FAST + "post_layernorm")
    for index in range(sizes.layers):
        layer = f"{FAST}encoder.layers.{index}."
        for name in "qkv":
            linear(f"{layer}self_attn.{name}_proj", d, d)
        linear(layer + "self_attn.out_proj", d, d)
        linear(layer + "mlp.fc1", d, m)
        linear(layer + "mlp.fc2", m, d)
        norm(layer + "layer_norm1")
        norm(layer + "layer_norm2")
    for name, tensor in convnext(sizes).state_dict().items():
        found[SLOW + name.replace("gamma", "weight")] = tuple(tensor.shape)
    for index in range(3 if sizes.adapters else 0):
        adapter = f"align_stages_latent.{index}."
        linear(adapter + "slow_conv", c, c, 1, 1)
        linear(adapter + "slow_proj", c, d, 1, 1)
        linear(adapter + "fast_conv", 1, d, 7, 7)
        linear(adapter + "fast_proj", d, d, 1, 1)
        linear(adapter + "gate.0", 2 * d, d // 2)
        linear(adapter + "gate.2", d // 2, 1)
    linear("align_stages.0.fast_proj", d, d)
    linear("align_stages.0.slow_proj", c, d)
    return found


def random_tensors(sizes, seed=0):
    """A tower of random weights, of which every one matters."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(sizes).items():
        values = torch.randn(shape, generator=rng)
        if len(shape) > 1 and "position_embedding" not in name:
            values = values / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(".weight"):  # norms and layer scales
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values = 0.2 * values
        made[name] = values
    return made


def see(sizes, tensors, pixels):
    """Features [T, N, D] of pictures [T, 3, S, S], and the attention of each layer, [T, heads, N, N]."""
    whole = convnext(sizes)
    slow = torch.nn.Sequential(OrderedDict(stem=whole.stem, stages=whole.stages))
    own = {name[len(SLOW) :]: tensor for name, tensor in tensors.items() if name.startswith(SLOW)}
    own = {
        name.replace("weight", "gamma") if is_scale(name) else name: tensor
        for name, tensor in own.items()
        if not name.startswith("head.")
    }
    x = torch.func.functional_call(slow, own, pixels, strict=True)  # [T, C, side, side]

    side, d = sizes.side, sizes.hidden
    y = F.interpolate(pixels, size=(side * 14, side * 14), mode="bilinear", align_corners=True)
    y = F.conv2d(y, tensors[FAST + "embeddings.patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    places = tensors[FAST + "embeddings.position_embedding.weight"][1:]
    places = places.T.reshape(1, d, sizes.trained, sizes.trained)
    places = F.interpolate(places, size=(side, side), mode="bicubic", antialias=True)
    y = norm(tensors, FAST + "pre_layrnorm", y + places.reshape(d, -1).T)
    seen = []
    for index in range(sizes.layers):
        quarter = sizes.layers // 4
        if sizes.adapters and index and index % quarter == 0:
            y = adapter(tensors, f"align_stages_latent.{index // quarter - 1}.", y, x)
        y, attention = layer(tensors, f"{FAST}encoder.layers.{index}.", y, sizes.heads)
        seen.append(attention)
    flat = x.flatten(2).transpose(1, 2)
    return linear(tensors, "align_stages.0.fast_proj", y) + linear(
        tensors, "align_stages.0.slow_proj", flat
    ), seen


def is_scale(name):
    """Whether it is a layer scale: `stages.S.blocks.B.weight`."""
    return name.startswith("stages.") and name.split(".")[-2].isdigit() and "blocks" in name


def linear(tensors, name, x):
    return F.linear(x, tensors[name + ".weight"], tensors[name + ".bias"])


def norm(tensors, name, x):
    return F.layer_norm(x, x.shape[-1:], tensors[name + ".weight"], tensors[name + ".bias"], 1e-5)


def conv(tensors, name, x, **options):
    return F.conv2d(x, tensors[name + ".weight"], tensors[name + ".bias"], **options)


def layer(tensors, name, y, heads):
    """One layer of CLIP, pre-norm, with GELU by a sigmoid."""
    normed = norm(tensors, name + "layer_norm1", y)
    q, k, v = (
        linear(tensors, f"{name}self_attn.{n}_proj", normed).unflatten(-1, (heads, -1)).transpose(1, 2)
        for n in "qkv"
    )
    attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    y = y + linear(tensors, name + "self_attn.out_proj", (attention @ v).transpose(1, 2).flatten(2))
    inner = linear(tensors, name + "mlp.fc1", norm(tensors, name + "layer_norm2", y))
    return y + linear(tensors, name + "mlp.fc2", inner * torch.sigmoid(1.702 * inner)), attention


def adapter(tensors, name, y, x):
    side = x.shape[-1]
    u = conv(tensors, name + "slow_proj", F.gelu(conv(tensors, name + "slow_conv", x)))
    grid = y.transpose(1, 2).reshape(len(y), -1, side, side)
    inner = F.gelu(conv(tensors, name + "fast_conv", grid, padding=3, groups=grid.shape[1]))
    grid = grid + conv(tensors, name + "fast_proj", inner)
    mean = torch.cat([grid, u], dim=1).mean(dim=(2, 3))
    gate = linear(tensors, name + "gate.2", F.gelu(linear(tensors, name + "gate.0", mean))).tanh()
    return (grid + gate[:, :, None, None] * u).flatten(2).transpose(1, 2)
