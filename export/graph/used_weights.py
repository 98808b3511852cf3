"""Finding the weights on which a module's results depend, which are those that its graph will hold.

A module may have others, such as the embedding table of a decoder that takes embeddings, or the value
projection of a layer of which only the attention is read. The weights themselves are not needed for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visprune.export.graph.trace import GraphInput, map_inputs, named_tensors

__all__ = ["used_tensors"]


class _Record(TorchDispatchMode):
    """A dispatch mode that records the arguments and results of each operator.

    It keeps the tensors themselves, so that no id is used twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[bool, list[Any], list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        taken, given = tree_leaves((args, kwargs)), tree_leaves(result)
        self.calls.append((function._schema.is_mutable, taken, given))
        return result


def used_tensors(module: nn.Module, inputs: Sequence[GraphInput | list[GraphInput]]) -> list[Tensor]:
    """Return the parameters and buffers on which the results of a module depend, each once.

    Args:
        module: A module with fake weights; this function must run inside their mode.
        inputs: The inputs of its graph.
    """
    examples = map_inputs(_example, inputs)
    # Outside inference mode the object of a view is not the one that its operator returned.
    with torch.inference_mode(), _Record() as record:
        results = module(*examples)
    wanted = {id(leaf) for leaf in tree_leaves(results)}
    for changes, taken, given in reversed(record.calls):
        if changes or any(id(leaf) in wanted for leaf in given):
            wanted.update(id(leaf) for leaf in taken)
    return list({id(t): t for t in named_tensors(module).values() if id(t) in wanted}.values())


def _example(item: GraphInput) -> Tensor:
    # A scalar is a count on which shapes depend, so it must have a real value even in the fake mode.
    return torch.ones(item.shape, dtype=item.dtype) if item.shape else torch.tensor(1, dtype=item.dtype)
