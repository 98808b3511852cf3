"""How much memory a model takes where it runs: weights, cache, activations, workspace.

    weights       of linear layers in their precision; the token table and the patch convolution in floats
    cache         2 x key-value heads x head size x (tokens that entered each layer + tokens of the answer)
    activations   of one layer in the largest stage: n (3 d + 3 m) floats, the residual stream, what enters
                  and leaves the attention, and the three of an MLP; all tiles of a picture at once
    workspace     one layer's attention probabilities, heads x n x n floats, as a kernel that is not fused
                  holds them

Norms and biases are left out: less than a thousandth. What the system and the runtime take is not here, but
in what a board has left for a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from visprune.estimate.flops import TokenCounts, head_macs, projector_macs
from visprune.estimate.planned_model import Subject
from visprune.estimate.roofline import cache_bytes, weight_bytes

__all__ = ["Footprint", "footprint", "parameters"]

_VISION_HEAD = 64  # size of a head of the vision tower, where shapes do not say it (SigLIP has 72)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes, each at its peak.

    Attributes:
        vision: Weights of the vision tower.
        projector: Of the projector.
        decoder: Of the layers of the LLM, and its output head.
        embedding: Of the token table.
        cache: Keys and values at the end of the answer.
        activations: Of one layer.
        workspace: Of one layer's attention.
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
        """All weights."""
        return self.vision + self.projector + self.decoder + self.embedding

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.workspace


def footprint(
    subject: Subject, tokens: TokenCounts, new_tokens: int, precision: str, item_size: int
) -> Footprint:
    """The memory of a model with its prompt and answer; arguments as of `roofline.works`."""
    shapes, per_weight = subject.shapes, weight_bytes(precision, item_size)
    patches = shapes.patch_values * shapes.vision_hidden_size
    stages = (  # rows, width, width of the MLP
        (tokens.tiles * shapes.vision_tokens, shapes.vision_hidden_size, shapes.vision_intermediate_size),
        (tokens.entering, shapes.hidden_size, shapes.intermediate_size),
    )
    square = (
        tokens.tiles * shapes.vision_tokens**2 * max(1, shapes.vision_hidden_size // _VISION_HEAD),
        tokens.entering**2 * max(1, shapes.hidden_size // subject.head_dim),
    )
    return Footprint(
        vision=int((subject.tower_weights - patches) * per_weight) + patches * item_size,
        projector=int(projector_macs(shapes, 1) * per_weight),
        decoder=int((shapes.num_layers * subject.layer_weights + head_macs(shapes)) * per_weight),
        embedding=head_macs(shapes) * item_size,
        cache=cache_bytes(subject, tokens, new_tokens, item_size),
        activations=max(rows * (3 * width + 3 * mlp) for rows, width, mlp in stages) * item_size,
        workspace=max(square) * item_size,
    )


def parameters(subject: Subject) -> int:
    """Numbers in all weights, the token table and the output head each counted."""
    shapes = subject.shapes
    decoder = shapes.num_layers * subject.layer_weights
    return subject.tower_weights + projector_macs(shapes, 1) + decoder + 2 * head_macs(shapes)
