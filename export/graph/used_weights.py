"""Which of its weights a module's results come from: those that its graph will hold.

A module may have more, such as the embedding of a decoder that is given embeddings, or the values of a layer
of which only the attention is looked at. No weights are needed to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visprune.export.graph.trace import GraphInput, named_tensors

__all__ = ["used_tensors"]


class _Record(TorchDispatchMode):
    """Keeps what each operator takes and gives; the tensors themselves, so that no id comes again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[bool, list[Any], list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        taken, given = tree_leaves((args, kwargs)), tree_leaves(result)
        self.calls.append((function._schema.is_mutable, taken, given))
        return result


def used_tensors(module: nn.Module, inputs: Sequence[GraphInput | list[GraphInput]]) -> list[Tensor]:
    """The parameters and buffers that the results of a module depend on, each once.

    Args:
        module: With fake weights; called under their mode.
        inputs: Of its graph.
    """
    examples = [[_example(i) for i in item] if isinstance(item, list) else _example(item) for item in inputs]
    # Without inference mode a view is not the tensor that its operator gave.
    with torch.inference_mode(), _Record() as record:
        results = module(*examples)
    wanted = {id(leaf) for leaf in tree_leaves(results)}
    for changes, taken, given in reversed(record.calls):
        if changes or any(id(leaf) in wanted for leaf in given):
            wanted.update(id(leaf) for leaf in taken)
    return list({id(t): t for t in named_tensors(module).values() if id(t) in wanted}.values())


def _example(item: GraphInput) -> Tensor:
    # A count is given as a number that is known, because shapes depend on it.
    return torch.ones(item.shape, dtype=item.dtype) if item.shape else torch.tensor(1, dtype=item.dtype)
