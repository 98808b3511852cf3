"""Memory of a model where it runs: weights, cache, activations and workspace.

    weights       linear layers in their precision; the token table and the patch convolution in floats
    cache         2 x key-value heads x head size x (tokens that entered each layer + tokens of the answer)
    activations   of one layer in the largest stage: n (3 d + 3 m) floats, which are the residual stream, the
                  input and output of the attention, and three vectors of an MLP; all tiles of a picture
                  count, and a block of a ConvNeXt counts as such a layer
    workspace     attention probabilities of one layer, heads x n x n floats, as a kernel that is not fused
                  holds them

Norms and biases are less than a thousandth and are left out. Memory that the system and the runtime take is
not here: it is subtracted from what a board has for a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from visprune.estimate.flops import head_macs, projector_macs
from visprune.estimate.planned_model import ModelSizes
from visprune.estimate.roofline import cache_bytes, weight_bytes
from visprune.estimate.token_schedule import TokenCounts

__all__ = ["Footprint", "footprint", "parameters"]

_VISION_HEAD = 64  # size of a head of the vision tower, which `Shapes` does not have (SigLIP's is 72)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model where it runs, each part at its peak.

    Attributes:
        vision: Weights of the vision tower.
        projector: Weights of the projector.
        decoder: Weights of the layers of the LLM and of its output head.
        embedding: The token table.
        cache: Keys and values at the end of the answer.
        activations: Activations of one layer.
        workspace: Attention probabilities of one layer.
    """

    vision: int
    projector: int
    decoder: int
    embedding: int
    cache: int
    activations: int
    workspace: int

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.vision + self.projector + self.decoder + self.embedding

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.cache + self.activations + self.workspace


def footprint(
    sizes: ModelSizes, tokens: TokenCounts, new_tokens: int, precision: str, item_size: int
) -> Footprint:
    """Compute the memory of a model with its prompt and answer; arguments as of `roofline.stage_works`."""
    shapes, per_weight = sizes.shapes.with_patches(tokens.patches), weight_bytes(precision, item_size)
    patches = shapes.patch_values * shapes.vision_hidden_size
    stages = (  # rows, width, width of the MLP
        (tokens.tiles * shapes.vision_tokens, shapes.vision_hidden_size, shapes.vision_intermediate_size),
        (tokens.entering, shapes.hidden_size, shapes.intermediate_size),
    )
    most = max(rows * (3 * width + 3 * mlp) for rows, width, mlp in stages)
    square = (
        tokens.tiles * shapes.vision_tokens**2 * max(1, shapes.vision_hidden_size // _VISION_HEAD),
        tokens.entering**2 * max(1, shapes.hidden_size // sizes.head_dim),
    )
    return Footprint(
        vision=int((sizes.tower_weights - patches) * per_weight) + patches * item_size,
        projector=int(projector_macs(shapes, 1) * per_weight),
        decoder=int((shapes.num_layers * sizes.layer_weights + head_macs(shapes)) * per_weight),
        embedding=head_macs(shapes) * item_size,
        cache=cache_bytes(sizes, tokens, new_tokens, item_size),
        activations=max(most, tokens.tiles * shapes.vision_other.values) * item_size,
        workspace=max(square) * item_size,
    )


def parameters(sizes: ModelSizes) -> int:
    """Return how many numbers all weights have; the token table and the output head each count."""
    shapes = sizes.shapes
    decoder = shapes.num_layers * sizes.layer_weights
    return sizes.tower_weights + projector_macs(shapes, 1) + decoder + 2 * head_macs(shapes)
