"""Records in the manifest of what later commands made of the exported graphs: quantization, and engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visprune.errors import UsageError

__all__ = ["Engine", "EngineProfile", "GraphError", "InputRange", "Quantization"]


@dataclass(frozen=True, slots=True)
class GraphError:
    """Error that quantization adds to the output of one graph, whose inputs come from the float graphs.

    Attributes:
        graph: Name of the graph.
        relative_l2: Norm of the difference, divided by the norm of the float output.
        cosine: Cosine of the angle between the two outputs.
    """

    graph: str
    relative_l2: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Quantization:
    """Quantization of a bundle.

    Attributes:
        parts: Precision of vision, projector, decoder, head and embedding; "float" if it was not quantized.
        samples: Calibration samples that the ranges come from; 0 if none are needed.
        kept_float: Linear layers that were not quantized because of their error.
        errors: Errors on samples that no range comes from; empty if there are no such samples.
        report: File with the error of every layer, sizes, times and answers.
    """

    parts: dict[str, str]
    samples: int
    kept_float: tuple[str, ...]
    errors: tuple[GraphError, ...]
    report: str

    def precisions(self, graph: str) -> set[str]:
        """Return the precisions of the parts of the model that are in a graph."""
        parts = {"vision_encoder": ("vision",), "token_pruner": ("projector",), "embedding": ("embedding",)}
        return {self.parts[part] for part in parts.get(graph, ("decoder", "head"))}


@dataclass(frozen=True, slots=True)
class InputRange:
    """Range of one input that an engine takes: its shapes, or its values if it is a count.

    Attributes:
        least: Smallest shape or value.
        usual: Shape or value that the engine is tuned for.
        most: Largest shape or value.

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
    """Ranges of all varying inputs that an engine is tuned for together."""

    name: Literal["all", "prefill", "decode"]
    inputs: dict[str, InputRange]


@dataclass(frozen=True, slots=True)
class Engine:
    """A TensorRT engine: a graph compiled for one kind of GPU.

    Attributes:
        graph: Name of the graph.
        file: File in the bundle.
        sm: SM of the GPUs that it is for, such as 86.
        flavour: Package that built it; only this package can load it.
        version: Version of that package.
        profiles: Profiles in the order of TensorRT's own index.
        cache_capacity: Tokens that the cache of each of its layers has room for, in buffers of that size that
            it writes in place; 0 if it puts out a longer cache at each step, or has no cache.
    """

    graph: str
    file: str
    sm: int
    flavour: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    profiles: tuple[EngineProfile, ...]
    cache_capacity: int = 0
