"""The manifest, `visprune.json`: all that one stage knows of what the stage before it made.

The manifest is a small dataflow program. Its stages run in order; each is one ONNX graph with an
explicit map {graph tensor: value name} for inputs and outputs, and every value is assigned once.
The runtime supplies these values and knows nothing else of the model:

    pixel_values              [T, 3, H, W]    of each new image
    keep_tokens               []  int64       visual tokens kept of a tile, or of the whole image where its
                                              tiles are chosen from at once
    input_ids                 [B, S]  int64   one placeholder for each kept visual token
    position_ids              [B, S]  int64
    past_key_values.{i}.key   [B, Hkv, P, Dh] and .value; P is 0 at first

and takes `logits` [B, 1, V], `keep_indices` [T, K] of each image, and `present.{i}.key` / `.value`, which are
the next step's `past_key_values`. A stage marked `image` runs once for each new image, before all others, and
what it assigns is joined along the first axis for them. A stage marked `visual` runs once where there are new
images. Where there are none, the values they would have assigned are those that their `bypass` names, or
else empty (their symbolic dimensions are 0).

Where an image becomes several tiles, the runtime also supplies, for each image (see `tiling`),

    token_places              [T, N]  int64   place of each token in the image's whole sequence; -1: padding
    newline_places            [R]     int64   places of the newline embeddings
    image_tokens              []  int64       tokens of the image that are left, newlines included
    token_sources             [T, N, J] int64 where tokens are resampled: what each is made of
    token_weights             [T, N, J]       and by which weights

Where tokens are pruned inside the LLM, at points k = 0, 1, ..., the runtime also supplies

    keep_tokens.{k}           []  int64       new tokens left after point k, text included
    position_ids.{k + 1}      [B, S]  int64   where survivors are numbered anew after point k

and takes `keep_indices.{k}` [B, S'], which of the new tokens that came to point k are left.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from visprune.budget import Budget, LayerBudget
from visprune.errors import UsageError
from visprune.tiling import Tiling
from visprune.work import Shapes

__all__ = [
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
    "Stage",
    "TensorSpec",
    "Text",
]

Scope = Literal["whole", "layers"]
"""How much of the LLM a self-check compares at a time."""

MANIFEST = "visprune.json"
SCHEMA_VERSION = 5

SUPPLIED = (
    "pixel_values",
    "keep_tokens",
    "input_ids",
    "position_ids",
    "token_places",
    "newline_places",
    "image_tokens",
    "token_sources",
    "token_weights",
)
"""What the runtime supplies beside the cache; no stage may assign it."""

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
    """An ONNX file, its external data beside it, and its interface."""

    file: str
    data: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the program. Maps go from the graph's tensor names to value names.

    `bypass` maps a value that this stage assigns to one that it reads, which it is where the stage does
    not run.
    """

    graph: str
    when: Literal["always", "visual", "image"]
    inputs: dict[str, str]
    outputs: dict[str, str]
    bypass: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pruning:
    """What was asked for before the LLM, and how it counts.

    Attributes:
        method: Name in the registry.
        options: The method's own knobs, as exported.
        keep_tokens: K of a tile by default; another may be asked for at run time. Without tiling an image is
            one tile.
        budget: How ratios become counts.
        grid: Rows and columns of patches, where the visual tokens are a whole grid.
        grid_offset: Index in the grid of visual token 0 (1 where a tower's first patch is not taken).
        always_kept: Tokens of an image kept besides, and not counted (a CLS that a `full` strategy keeps).
            Inside the LLM they are visual tokens like the others.
        positions: How survivors are numbered for the LLM.
        projects_all: Whether all tokens go through the projector, and not only those kept.
    """

    method: str
    options: dict[str, Any]
    keep_tokens: int
    budget: Budget
    grid: tuple[int, int] | None
    grid_offset: int
    always_kept: int
    positions: Literal["contiguous"]
    projects_all: bool = False


@dataclass(frozen=True, slots=True)
class LayerPruning:
    """What was asked for inside the LLM, and how it counts.

    Attributes:
        method: Name in the registry.
        options: The method's own knobs, as exported.
        layers: The prune points: the layer after whose attention tokens leave, each. Its cache still
            holds all that entered it, the caches of later layers only those left.
        boundary: Whether they leave before that layer's MLP or after it.
        positions: Whether survivors keep their original positions or are numbered anew.
        budget: How ratios become counts.
    """

    method: str
    options: dict[str, Any]
    layers: tuple[int, ...]
    boundary: Literal["attention", "layer"]
    positions: Literal["original", "renumbered"]
    budget: LayerBudget

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if len(self.layers) != self.budget.points or not ascending or min(self.layers, default=-1) < 0:
            raise UsageError(
                f"The prune layers {self.layers} do not fit {self.budget.points} prune points.",
                "Give one layer for each, ascending.",
            )

    def supplied(self) -> list[str]:
        """Names of the values that the runtime supplies for the prune points."""
        names = [f"keep_tokens.{k}" for k in range(len(self.layers))]
        renumbered = [f"position_ids.{k + 1}" for k in range(len(self.layers))]
        return names + (renumbered if self.positions == "renumbered" else [])

    def describe(self, entering: int, kept: tuple[int, ...]) -> str:
        """Such as 'kept 288 of 576 visual tokens after the attention of layer 1, 50% removed in the end'."""
        place = f"layer{'s' if len(kept) > 1 else ''} {_listed(self.layers)}"
        if self.boundary == "attention":
            place = f"the attention of {place}"
        removed = 100.0 * (1.0 - kept[-1] / entering)
        return (
            f"kept {_listed(kept)} of {entering} visual tokens after {place}, "
            f"{removed:.4g}% removed{' in the end' if len(kept) > 1 else ''}"
        )

    def kept_by_layer(self, num_layers: int, kept: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """Visual tokens that enter each layer, of `tokens` that enter the LLM and `kept` after each point."""
        counts = (tokens, *kept)
        return tuple(counts[sum(point < i for point in self.layers)] for i in range(num_layers))


def _listed(numbers: tuple[int, ...]) -> str:
    """For people: 1, 2 and 3."""
    *some, last = map(str, numbers)
    return f"{', '.join(some)} and {last}" if some else last


@dataclass(frozen=True, slots=True)
class Decoder:
    """What the runtime must know of the LLM.

    Raises:
        UsageError: A size is not positive, or the cache has a dtype that none has.
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
        """Most tokens of one sequence: the context, or the sliding window, which the graphs do not have."""
        return min(self.context_length, self.sliding_window or self.context_length)


@dataclass(frozen=True, slots=True)
class Text:
    """Tokenizer and chat template, as files of the bundle, and the placeholders of pictures and videos."""

    tokenizer: str
    chat_template: str | None
    image_token: str
    image_token_id: int
    bos_token: str | None
    eos_token: str | None
    video_token: str | None = None
    video_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from, and what wrote the bundle. `revision` is the commit of a hub id."""

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
    """The self-check of an export.

    `verified` is False where the user asked for none, and where what was checked has been quantized since.
    `scope` is "layers" where the layers of the LLM were compared one by one, and not its greedy tokens.
    """

    verified: bool
    rows: tuple[ParityRow, ...] = ()
    scope: Scope = "whole"


@dataclass(frozen=True, slots=True)
class GraphError:
    """What quantization adds to the output of one graph, fed with what the float graphs before it give.

    Attributes:
        graph: Its name.
        relative_l2: Norm of the difference by the norm of the float output.
        cosine: Of the angle between the two.
    """

    graph: str
    relative_l2: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a bundle was quantized.

    Attributes:
        parts: Precision of vision, projector, decoder, head and embedding; "float" where left as it was.
        samples: Calibration samples that ranges come from; 0 where none are needed.
        kept_float: Linear layers that were left out because of their error.
        errors: On samples that no range comes from; empty where there are none.
        report: The file with the error of every layer, sizes, times and answers.
    """

    parts: dict[str, str]
    samples: int
    kept_float: tuple[str, ...]
    errors: tuple[GraphError, ...]
    report: str

    def precisions(self, graph: str) -> set[str]:
        """Of the parts of the model that are in a graph."""
        parts = {"vision_encoder": ("vision",), "token_pruner": ("projector",), "embedding": ("embedding",)}
        return {self.parts[part] for part in parts.get(graph, ("decoder", "head"))}


@dataclass(frozen=True, slots=True)
class InputRange:
    """What an engine takes of one input: its shape, or the value of one that is a count.

    Raises:
        UsageError: The three are not ascending.
    """

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]

    def __post_init__(self) -> None:
        alike = len(self.least) == len(self.usual) == len(self.most)
        rows = zip(self.least, self.usual, self.most, strict=False)
        if not alike or not all(0 <= a <= b <= c for a, b, c in rows):
            raise UsageError(
                f"{self.least}, {self.usual}, {self.most} are no range.", "Give the least, usual and most."
            )


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Ranges that an engine is tuned for together, of every input that varies."""

    name: Literal["all", "prefill", "decode"]
    inputs: dict[str, InputRange]


@dataclass(frozen=True, slots=True)
class Engine:
    """A graph compiled for one kind of GPU.

    Attributes:
        graph: Its name.
        file: In the bundle.
        sm: Of the GPUs that it is for, such as 86.
        flavour: The package that built it, and alone can load it.
        version: Of that package.
        profiles: In the order of TensorRT's own index.
        cache_capacity: Tokens that the cache of each of its layers has room for, in buffers of that size
            which it writes in place; 0 where it puts out a longer cache at each step, or has none.
    """

    graph: str
    file: str
    sm: int
    flavour: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    profiles: tuple[EngineProfile, ...]
    cache_capacity: int = 0


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of `visprune.json`."""

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
        """The text of `visprune.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"
