"""LLaVA-HR's vision tower, which transformers does not have: two towers that see one picture.

The slow tower is a ConvNeXt on the picture of S x S pixels, the fast tower a CLIP ViT without a class token
on a copy of S / 32 x 14 pixels. Both see a grid of S / 32 x S / 32 places. Importing this module registers
the tower with transformers, which must happen before a configuration with it is read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visprune.export.models.llava_hr_modules import Embeddings, Layer, SlowTower
from visprune.work import OtherWork

__all__ = ["PREFIX_TOKENS", "LlavaHrVisionConfig", "LlavaHrVisionModel", "embed", "layers", "other_work"]

PREFIX_TOKENS = 0


class LlavaHrVisionConfig(CLIPVisionConfig):
    """The configuration of the tower; its defaults are those of the published LLaVA-HR-7B.

    The fields of CLIP describe the ViT, except `image_size` and `patch_size`, which describe the whole tower:
    pixels along a side, and pixels for each visual token.

    Attributes:
        fast_patch_size: Pixels along a side of a patch of the ViT, in its own smaller picture.
        slow_depths: Blocks in each stage of the ConvNeXt.
        slow_hidden_sizes: Channels of each stage of the ConvNeXt.
        slow_layer_norm_eps: Epsilon of all norms of the ConvNeXt.
        adapters: Whether the ViT has the three adapters; a tower that was frozen in training has none.
    """

    model_type = "llava_hr_vision_model"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 1024
    patch_size: int = 32
    fast_patch_size: int = 14
    slow_depths: list[int] | tuple[int, ...] = (3, 3, 27, 3)
    slow_hidden_sizes: list[int] | tuple[int, ...] = (192, 384, 768, 1536)
    slow_layer_norm_eps: float = 1e-6
    adapters: bool = True


class LlavaHrVisionModel(PreTrainedModel):
    """The tower as a model of transformers: pixel_values [T, 3, S, S] -> hidden states [T, N, D].

    The last hidden state is the merged features of both towers.
    """

    config_class = LlavaHrVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: LlavaHrVisionConfig) -> None:
        super().__init__(config)
        self.slow_tower = SlowTower(config)
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the input of the first layer and the output of each; other arguments are ignored."""
        hidden, slow = embed(self, pixel_values)
        states = [hidden]
        for layer in self.layers:
            states.append(layer(states[-1], slow))
        return BaseModelOutputWithPooling(last_hidden_state=states[-1], hidden_states=tuple(states))


def embed(tower: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input of the first layer, and the features of the ConvNeXt, which every layer takes.

    [T, 3, S, S] -> [T, N, D], [T, C, S / 32, S / 32]
    """
    return tower.pre_layrnorm(tower.embeddings(pixel_values)), tower.slow_tower(pixel_values)


def layers(tower: Any) -> nn.ModuleList:
    """Return the encoder layers, first to last, with their adapters and the merge."""
    found: nn.ModuleList = tower.layers
    return found


def other_work(tower: Any, depth: int) -> OtherWork:
    """Return the work of the ConvNeXt, and of the adapters and the merge of the first `depth` layers.

    A weight of a linear layer or a convolution costs a MAC at each place of its output. A block of the
    ConvNeXt holds what a transformer layer of its width would: 3 values a channel, and 3 for each of the 4
    that its MLP makes of one.
    """
    config = tower.config
    side = config.image_size // config.patch_size
    sides = [8 * side, 4 * side, 2 * side, side]  # of the output of each stage
    parts: list[tuple[int, nn.Module]] = [(sides[0], tower.slow_tower.embeddings)]
    parts += zip(sides, tower.slow_tower.stages, strict=True)
    for layer in tower.layers[:depth]:
        for module in (layer.adapter, layer.merge):
            if module is not None:  # a gate is computed from the mean over the picture, so at one place
                parts += [(1 if name == "gate" else side, part) for name, part in module.named_children()]
    weights = [(edge * edge, _weights(part)) for edge, part in parts]
    widths = zip(sides, config.slow_hidden_sizes, strict=True)
    return OtherWork(
        macs=sum(places * count for places, count in weights),
        weights=sum(count for _, count in weights),
        values=max(edge * edge * (3 + 3 * 4) * width for edge, width in widths),
    )


def _weights(module: nn.Module) -> int:
    """Return how many weights the linear layers and convolutions of a module have."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


AutoConfig.register(LlavaHrVisionConfig.model_type, LlavaHrVisionConfig, exist_ok=True)
AutoModel.register(LlavaHrVisionConfig, LlavaHrVisionModel, exist_ok=True)
