"""The attention that visual tokens receive in each decoder layer, measured in PyTorch for FitPrune's search.

The vision encoder runs once for each sample. The decoder runs half layer by half layer, as its segments do,
with its own submodules. Each attention matrix is reduced over heads when it is made, and then released.
Deleted tokens leave the residual stream; the others keep their positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visprune.errors import InputError
from visprune.export import models
from visprune.export.checkpoint.prompt_maker import Prompt
from visprune.export.graph import attention
from visprune.export.graph.attention import Recorder
from visprune.export.graph.layers import attend, causal_mask, feed_forward
from visprune.export.models.parts import Parts
from visprune.pruning.recipe_task import Attention

__all__ = ["DecoderPass", "DecoderSample", "prepare", "sample"]


@dataclass(slots=True)
class DecoderPass:
    """The state of one sample between two layers of the decoder; implements `recipe_task.Pass`.

    Attributes:
        layers: The decoder's layers.
        hidden: Residual stream [1, S, D], after the attention block of the layer before `following`; at
            first, the input of the decoder.
        rotary: Cosine and sine of the tokens' positions, [1, S, Dh] each.
        visual: Indices of the visual tokens among the S tokens, [n].
        first_text: Index of the first token after the image.
        following: The layer whose attention block runs next.
    """

    layers: Sequence[Any]
    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    visual: Tensor
    first_text: int
    following: int = 0

    @torch.no_grad()
    def attend(self, layer: int) -> Attention:
        """Run the MLP of the layer before and the attention block of this layer.

        Returns:
            The attention that each visual token receives on average from visual tokens and from text tokens.

        Raises:
            ValueError: The layer is not the next one.
        """
        if layer != self.following:
            raise ValueError(f"layer {self.following} comes next, not {layer}")
        if layer:
            self.hidden = feed_forward(self.layers[layer - 1], self.hidden)
        recorder = Recorder(maximum=True)
        mask = causal_mask(self.hidden.shape[1], 0, self.hidden.dtype).to(self.hidden.device)
        self.hidden = attend(self.layers[layer], self.hidden, self.rotary, mask, None, recorder)
        self.following = layer + 1
        received = recorder.value[0].index_select(1, self.visual)  # [S, n]
        from_visual = received.index_select(0, self.visual).double().mean(0)
        from_text = received[self.first_text :].double().mean(0)
        return Attention(from_visual.cpu().numpy(), from_text.cpu().numpy())

    @torch.no_grad()
    def delete(self, indices: NDArray[np.int64]) -> None:
        """Delete visual tokens by their indices among the visual tokens that are left."""
        keep = torch.ones(self.hidden.shape[1], dtype=torch.bool, device=self.hidden.device)
        keep[self.visual[torch.from_numpy(indices).to(self.visual.device)]] = False
        places = keep.cumsum(0) - 1
        self.hidden = self.hidden[:, keep]
        self.rotary = (self.rotary[0][:, keep], self.rotary[1][:, keep])
        self.visual = places[self.visual[keep[self.visual]]]
        self.first_text -= len(indices)

    def copy(self) -> DecoderPass:
        """Return a copy from which to go on; the tensors are shared, because none is changed in place."""
        return dataclasses.replace(self)


@dataclass(frozen=True, slots=True)
class DecoderSample:
    """An image and a prompt in front of the decoder; see `recipe_task.FitSample`."""

    first: DecoderPass

    def start(self) -> DecoderPass:
        """Return a pass that begins before the first layer."""
        return self.first.copy()


def prepare(model: Any, parts: Parts) -> None:
    """Give the decoder the attention function that can record attention.

    Raises:
        UnsupportedError: The decoder's layers are not of Llama's form, so tokens cannot be deleted inside
            one.
    """
    models.check_cut(model.config.text_config.model_type)
    attention.register()
    parts.language_model.set_attn_implementation(attention.IMPLEMENTATION["primitive"])


@torch.no_grad()
def sample(model: Any, parts: Parts, prompt: Prompt) -> DecoderSample:
    """Run the vision encoder on one prompt, and insert the visual tokens.

    Raises:
        InputError: The number of visual tokens is not the number of placeholders in the prompt.
    """
    device = next(parts.language_model.parameters()).device
    pixels = prompt.pixel_values.to(device, next(parts.tower.parameters()).dtype)
    sizes = {} if prompt.image_sizes is None else {"image_sizes": prompt.image_sizes}
    features = torch.cat(list(model.get_image_features(pixel_values=pixels, **sizes).pooler_output))  # [N, D]
    if len(features) != len(prompt.visual):
        raise InputError(
            f"The prompt has placeholders for {len(prompt.visual)} visual tokens, and the vision encoder "
            f"makes {len(features)}.",
            "Take the preprocessor_config.json that belongs to the model.",
        )
    visual = prompt.visual.to(device)
    ids = prompt.input_ids.to(device).clone()
    ids[0, visual] = 0  # a placeholder's id may be beyond the table, and its row is replaced anyway
    hidden = parts.language_model.get_input_embeddings()(ids).clone()
    hidden[0, visual] = features.to(hidden.dtype)
    positions = torch.arange(hidden.shape[1], device=device).unsqueeze(0)
    decoder: Any = parts.language_model
    rotary = decoder.rotary_emb(hidden, positions)
    return DecoderSample(DecoderPass(decoder.layers, hidden, rotary, visual, int(visual[-1]) + 1))
