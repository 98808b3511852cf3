"""What a decoder's attention says of its visual tokens, for FitPrune's search: PyTorch `Sample`s.

The vision encoder runs once a sample. The decoder runs half layer by half layer, as its segments do, with
its own submodules; each attention matrix is reduced over heads as it is made, and dropped at once. Tokens
that are deleted leave the residual stream, and the others keep their positions.
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
    """One sample on its way through the decoder; see `recipe_task.Pass`.

    Attributes:
        layers: Of the decoder.
        hidden: [1, S, D], behind the attention block of the layer before `following`, if there is one.
        rotary: Cosine and sine of the positions of these tokens, [1, S, Dh].
        visual: [n], their places.
        first_text: The place of the first token after the image.
        following: The layer whose attention comes next.
    """

    layers: Sequence[Any]
    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    visual: Tensor
    first_text: int
    following: int = 0

    @torch.no_grad()
    def attend(self, layer: int) -> Attention:
        """Finish the layer before, and run the attention block of this one."""
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
        """Drop visual tokens; the indices count those left."""
        keep = torch.ones(self.hidden.shape[1], dtype=torch.bool, device=self.hidden.device)
        keep[self.visual[torch.from_numpy(indices).to(self.visual.device)]] = False
        places = keep.cumsum(0) - 1
        self.hidden = self.hidden[:, keep]
        self.rotary = (self.rotary[0][:, keep], self.rotary[1][:, keep])
        self.visual = places[self.visual[keep[self.visual]]]
        self.first_text -= len(indices)

    def copy(self) -> DecoderPass:
        """Another pass from here; tensors are never changed in place, so they are shared."""
        return dataclasses.replace(self)


@dataclass(frozen=True, slots=True)
class DecoderSample:
    """An image and a prompt in front of the decoder; see `recipe_task.FitSample`."""

    first: DecoderPass

    def start(self) -> DecoderPass:
        """A pass before the first layer."""
        return self.first.copy()


def prepare(model: Any, parts: Parts) -> None:
    """Make the decoder spell its attention out, so that it can be recorded.

    Raises:
        UnsupportedError: Its layers are not of Llama's form, so tokens cannot leave within one.
    """
    models.check_cut(model.config.text_config.model_type)
    attention.register()
    parts.language_model.set_attn_implementation(attention.IMPLEMENTATION["primitive"])


@torch.no_grad()
def sample(model: Any, parts: Parts, prompt: Prompt) -> DecoderSample:
    """Run the vision encoder on one prompt, and put the visual tokens in place.

    Raises:
        InputError: The encoder gives another number of visual tokens than the prompt has places.
    """
    device = next(parts.language_model.parameters()).device
    pixels = prompt.pixel_values.to(device, next(parts.tower.parameters()).dtype)
    sizes = {} if prompt.image_sizes is None else {"image_sizes": prompt.image_sizes}
    features = torch.cat(list(model.get_image_features(pixel_values=pixels, **sizes).pooler_output))  # [N, D]
    if len(features) != len(prompt.visual):
        raise InputError(
            f"The prompt has places for {len(prompt.visual)} visual tokens, and the vision encoder makes "
            f"{len(features)}.",
            "Take the preprocessor_config.json that belongs to the model.",
        )
    visual = prompt.visual.to(device)
    ids = prompt.input_ids.to(device).clone()
    ids[0, visual] = 0  # a placeholder may lie beyond the table, and its row is replaced
    hidden = parts.language_model.get_input_embeddings()(ids).clone()
    hidden[0, visual] = features.to(hidden.dtype)
    positions = torch.arange(hidden.shape[1], device=device).unsqueeze(0)
    decoder: Any = parts.language_model
    rotary = decoder.rotary_emb(hidden, positions)
    return DecoderSample(DecoderPass(decoder.layers, hidden, rotary, visual, int(visual[-1]) + 1))
