"""The manifest, `visprune.json`: everything that a command knows about a bundle that another command made.

The manifest is a small dataflow program. Its stages run in order. Each stage is one ONNX graph with an
explicit map {graph tensor: value name} for inputs and outputs, and every value is assigned once. The runtime
supplies these values and knows nothing else about the model:

    pixel_values              [T, 3, H, W]    of each new image
    keep_tokens               []  int64       visual tokens kept of a tile, or of the whole image if all its
                                              tiles are chosen from at once
    input_ids                 [B, S]  int64   one placeholder for each kept visual token
    position_ids              [B, S]  int64
    past_key_values.{i}.key   [B, Hkv, P, Dh] and .value; P is 0 at first

It takes `logits` [B, 1, V], `keep_indices` [T, K] of each image and, if tokens are merged, `merge_weights`
[T, K, N], and `present.{i}.key` / `.value`, which are
the next step's `past_key_values`. A stage marked `image` runs once for each new image, before all other
stages; the values that it assigns are joined along the first axis for them. A stage marked `visual` runs once
if there are new images. If there are none, the values that such stages would assign are those that their
`bypass` names, or else empty (their symbolic dimensions are 0).

If an image becomes several tiles, the runtime also supplies, for each image (see `tiling`),

    token_places              [T, N]  int64   place of each token in the image's whole sequence; -1: padding
    newline_places            [R]     int64   places of the newline embeddings
    image_tokens              []  int64       tokens of the image that are left, newlines included
    token_sources             [T, N, J] int64 if tokens are resampled: the tokens that each is mixed from
    token_weights             [T, N, J]       and their weights

If the method before the LLM reads the question, the runtime also supplies, for each image,

    question_ids              [1, Q]  int64   tokens of the text that the image came with

and `empty`, which has no elements (its symbolic dimensions are 0).

If tokens are pruned inside the LLM, at points k = 0, 1, ..., the runtime also supplies

    keep_tokens.{k}           []  int64       new tokens left after point k, text included
    position_ids.{k + 1}      [B, S]  int64   if kept tokens are numbered anew after point k

and takes `keep_indices.{k}` [B, S'], which of the new tokens that came to point k are left.

The records of pruning, and of what other commands make of the graphs, are in modules of their own; import
them from here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from visprune.errors import UsageError
from visprune.manifest_builds import Engine, EngineProfile, GraphError, InputRange, Quantization
from visprune.manifest_pruning import LayerPruning, Pruning
from visprune.tiling import Tiling
from visprune.work import Shapes

__all__ = [
    "EMPTY",
    "MANIFEST",
    "SCHEMA_VERSION",
    "SUPPLIED",
    "Decoder",
    "Engine",
    "EngineProfile",
    "FileRecord",
    "Graph",
    "GraphError",
    "InputRange",
    "LayerPruning",
    "Manifest",
    "Parity",
    "ParityRow",
    "Pruning",
    "Quantization",
    "Scope",
    "Source",
    "SourcePart",
    "Stage",
    "TensorSpec",
    "Text",
]

Scope = Literal["whole", "layers"]
"""Part of the LLM that a self-check compares at a time."""

MANIFEST = "visprune.json"
SCHEMA_VERSION = 7

EMPTY = "empty"
"""The value without elements."""

SUPPLIED = (
    EMPTY,
    "pixel_values",
    "keep_tokens",
    "input_ids",
    "position_ids",
    "token_places",
    "newline_places",
    "image_tokens",
    "token_sources",
    "token_weights",
    "question_ids",
)
"""Values that the runtime supplies besides the cache; no stage may assign them."""

_CACHE_DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph.

    `dtype` is NumPy's name; a string in `shape` is a symbolic dimension.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX graph: its file, the file of its external data, and its inputs and outputs."""

    file: str
    data: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the program.

    Attributes:
        graph: Name of the graph that it runs.
        when: Whether it runs always, once if there are new images ("visual"), or for each of them ("image").
        inputs: Map from the graph's tensor names to value names.
        outputs: Map from the graph's tensor names to value names.
        bypass: Map from a value that this stage assigns to one that it reads. When the stage does not run,
            the first is the second.
    """

    graph: str
    when: Literal["always", "visual", "image"]
    inputs: dict[str, str]
    outputs: dict[str, str]
    bypass: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Facts about the LLM that the runtime needs.

    Attributes:
        num_layers: Layers.
        num_kv_heads: Heads that have keys and values of their own.
        head_dim: Size of a head.
        cache_dtype: Dtype of keys and values, "float32" or "float16".
        vocab_size: Size of the logits.
        context_length: The most positions of the model.
        sliding_window: Size of the window in which a layer attends; None if there is none.
        eos_token_ids: Tokens that end an answer.

    Raises:
        UsageError: A size is not positive, or `cache_dtype` is no dtype of a cache.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    cache_dtype: str
    vocab_size: int
    context_length: int
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = ("num_layers", "num_kv_heads", "head_dim", "vocab_size", "context_length", "sliding_window")
        for name in sizes:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UsageError(f"{name} is {size}.", "Give a number of at least 1.")
        if self.cache_dtype not in _CACHE_DTYPES:
            raise UsageError(
                f"cache_dtype is {self.cache_dtype!r}.", f"Give one of: {', '.join(_CACHE_DTYPES)}."
            )

    @property
    def context_limit(self) -> int:
        """The most tokens of a sequence: the context, or the sliding window, which graphs do not have."""
        return min(self.context_length, self.sliding_window or self.context_length)


@dataclass(frozen=True, slots=True)
class Text:
    """Tokenizer and chat template, as files of the bundle, and the placeholders of images and videos."""

    tokenizer: str
    chat_template: str | None
    image_token: str
    image_token_id: int
    bos_token: str | None
    eos_token: str | None
    video_token: str | None = None
    video_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class SourcePart:
    """A part of the model that came from a place of its own: a vision tower, or an adapter that was merged.

    Attributes:
        role: "vision tower" or "adapter".
        name: Hub id, or name of the directory.
        sha256: Over the names and hashes of its files.
        revision: The commit of a hub id.
    """

    role: Literal["vision tower", "adapter"]
    name: str
    sha256: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Origin of the weights, and the versions that wrote the bundle.

    Attributes:
        model: Hub id, or name of the directory.
        model_type: Type of the model, as transformers names it.
        vision_type: Type of the vision tower.
        text_type: Type of the decoder.
        parameters: Number of parameters.
        weights_dtype: Dtype of the weights on disk.
        weights_sha256: Over the names and hashes of all files with weights, those of the parts included.
        versions: Of the packages that wrote the bundle.
        created: Date and time.
        revision: The commit of a hub id.
        parts: Parts that came from places of their own, adapters in the order in which they were merged.
        conversation: Name of the prompt form, if the chat template is one of LLaVA's own.
        pickled_weights: Whether some weights were read from pickles.
    """

    model: str
    model_type: str
    vision_type: str
    text_type: str
    parameters: int
    weights_dtype: str
    weights_sha256: str
    versions: dict[str, str]
    created: str
    revision: str | None = None
    parts: tuple[SourcePart, ...] = ()
    conversation: str | None = None
    pickled_weights: bool = False


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One comparison of the exported graphs with PyTorch."""

    name: str
    difference: float
    tolerance: float
    passed: bool
    note: str


@dataclass(frozen=True, slots=True)
class Parity:
    """Result of the self-check of an export.

    Attributes:
        verified: False if the user asked for no check, or if the bundle was quantized after it.
        rows: The comparisons.
        scope: "layers" if the layers of the LLM were compared one by one, and not its greedy tokens.
    """

    verified: bool
    rows: tuple[ParityRow, ...] = ()
    scope: Scope = "whole"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `visprune.json`."""

    schema_version: int
    source: Source
    target: str
    flavour: Literal["native", "primitive"]
    dtype: str
    opset: int
    graphs: dict[str, Graph]
    stages: tuple[Stage, ...]
    pruning: Pruning
    decoder: Decoder
    text: Text
    image_processor: str
    parity: Parity
    files: dict[str, FileRecord] = field(default_factory=dict)
    layer_pruning: LayerPruning | None = None
    shapes: Shapes | None = None
    tiling: Tiling | None = None
    video_processor: str | None = None
    quantization: Quantization | None = None
    engines: tuple[Engine, ...] = ()

    def to_json(self) -> str:
        """Return the text of `visprune.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"
