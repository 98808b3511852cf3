"""Work of a transformer layer in multiply-accumulates (MAC): the formulas behind every figure.

With n tokens, hidden size d and MLP size m, there are two conventions in print:

    F2 = 4 n d^2 + 2 n^2 d + 2 n d m     two MLP matrices (FastV, DivPrune, VisionZip; right for a ViT)
    F3 = 4 n d^2 + 2 n^2 d + 3 n d m     three, as SwiGLU has (PyramidDrop, FitPrune; right for LLaMA)

Queries, keys, values and output count n d^2 each, even if heads share keys. A FLOP count is twice the MAC
count. If tokens are deleted inside a layer, after attention and before the output projection, the layer costs
`before_deletion` of the tokens that entered and `after_deletion` of the tokens left.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from visprune.errors import UsageError

__all__ = ["Convention", "LayerWork", "OtherWork", "Shapes"]

Convention = Literal["F2", "F3"]


@dataclass(frozen=True, slots=True)
class LayerWork:
    """Work of one layer, in MACs.

    Attributes:
        hidden_size: d.
        intermediate_size: m.
        convention: Matrices of the MLP: "F2" for two, "F3" for three.
    """

    hidden_size: int
    intermediate_size: int
    convention: Convention = "F3"

    def before_deletion(self, tokens: int) -> int:
        """Return the MACs of queries, keys, values and attention: 3 n d^2 + 2 n^2 d."""
        n, d = tokens, self.hidden_size
        return 3 * n * d * d + 2 * n * n * d

    def after_deletion(self, tokens: int) -> int:
        """Return the MACs of the output projection and the MLP: n d^2 + 2 n d m or 3 n d m."""
        n, d = tokens, self.hidden_size
        matrices = {"F2": 2, "F3": 3}[self.convention]
        return n * d * d + matrices * n * d * self.intermediate_size

    def layer(self, tokens: int) -> int:
        """Return the MACs of a whole layer in which nothing is deleted."""
        return self.before_deletion(tokens) + self.after_deletion(tokens)


@dataclass(frozen=True, slots=True)
class OtherWork:
    """Work of a vision tower for one image, beside its patch embedding and the matrices of its layers.

    Attributes:
        macs: Multiply-accumulates.
        weights: Numbers in the weights that do this work.
        values: The most numbers that one layer of this part holds at once.

    Raises:
        UsageError: A number is negative.
    """

    macs: int = 0
    weights: int = 0
    values: int = 0

    def __post_init__(self) -> None:
        if min(self.macs, self.weights, self.values) < 0:
            raise UsageError(f"{self} has a negative number.", "Give numbers of at least 0.")


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes that a model's work depends on; the manifest of a bundle has them.

    Attributes:
        vision_hidden_size: Hidden size of the vision tower.
        vision_intermediate_size: Size of the vision tower's MLPs, which have two matrices.
        vision_layers: Layers of the vision tower that run: those up to the feature layer.
        vision_tokens: Tokens of one image in the vision tower (577 for CLIP-L/336, with its CLS).
        vision_patches: Patches of one image (576).
        patch_values: Pixels of a patch times channels, as the patch embedding sees them.
        projector: (in, out) of each linear layer of the projector, first to last.
        hidden_size: Hidden size of the decoder.
        intermediate_size: Size of the decoder's MLPs.
        num_layers: Layers of the decoder.
        vocab_size: Rows of the output head.
        convention: "F3" for a decoder whose MLP has three matrices, "F2" for one with two.
        vision_other: What else the vision tower does, such as the ConvNeXt of LLaVA-HR.

    Raises:
        UsageError: A size is not positive.
    """

    vision_hidden_size: int
    vision_intermediate_size: int
    vision_layers: int
    vision_tokens: int
    vision_patches: int
    patch_values: int
    projector: tuple[tuple[int, int], ...]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int
    convention: Convention = "F3"
    vision_other: OtherWork = OtherWork()

    def with_patches(self, patches: int | None) -> Shapes:
        """Return the sizes for images that are made smaller, to a number of patches; None: as they are."""
        if patches is None:
            return self
        more = patches - self.vision_patches
        return replace(self, vision_patches=patches, vision_tokens=self.vision_tokens + more)

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in fields(self)}
        numbers = {name: [size] for name, size in sizes.items() if isinstance(size, int)}
        numbers["projector"] = [size for linear in self.projector for size in linear]
        for name, values in numbers.items():
            least = 0 if name == "vision_layers" else 1  # a model may take the patch embeddings as features
            if min(values, default=least) < least:
                raise UsageError(f"{name} is {sizes[name]}.", f"Give a number of at least {least}.")
