"""Tracing made quicker for tests: what PyTorch's exporter has translated once, it need not translate again.

Each module is still captured by `torch.export`. The decomposition and the translation into ONNX that follow
depend on the captured program alone, and take most of the time: their result is remembered by a hash of this
program. Tiny models of many tests share their embeddings and decoders.
"""

from __future__ import annotations

import copy
import gc
import hashlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")

__all__ = ["_collected", "_quick_traces"]


@pytest.fixture(autouse=True, scope="session")
def _quick_traces():
    """Let torch gather its operators once, where it does so for every graph, and remember translations."""
    from torch._export import utils
    from torch.onnx._internal.exporter import _core, _registration

    if isinstance(getattr(_core._prepare_exported_program_for_export, "__self__", None), Translations):
        yield  # another folder's tests have begun it
        return
    gather, made = _registration.ONNXRegistry.from_torchlib, {}

    def from_torchlib(*arguments, **options):
        key = (arguments, tuple(options.items()))
        if key not in made:
            made[key] = gather(*arguments, **options)
        registry = copy.copy(made[key])
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    remembered = Translations(_core)
    utils._materialize_cpp_cia_ops()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        patch.setattr(utils, "_materialize_cpp_cia_ops", lambda: None)
        patch.setattr(_core, "_prepare_exported_program_for_export", remembered.prepare)
        patch.setattr(_core, "_exported_program_to_onnx_program", remembered.translate)
        yield


@pytest.fixture(autouse=True, scope="module")
def _collected():
    """What is imported stays; a collector that looks through it again and again takes another tenth."""
    gc.collect()
    gc.freeze()


class Translations:
    """The exporter's second and third step, with a memory in between."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._prepare = core._prepare_exported_program_for_export
        self._translate = core._exported_program_to_onnx_program
        self._models: dict[str, Any] = {}
        self._prepared: tuple[str, Any] | None = None

    def prepare(self, program: Any, *, registry: Any) -> Any:
        key = fingerprint(program, registry)
        if key not in self._models:
            program = self._prepare(program, registry=registry)
        self._prepared = (key, program)
        return program

    def translate(self, program: Any, *, registry: Any) -> Any:
        assert self._prepared is not None
        key, prepared = self._prepared
        assert prepared is program
        if key not in self._models:
            self._models[key] = self._translate(program, registry=registry).model.clone()
        return self._core._onnx_program.ONNXProgram(self._models[key].clone(), program)


def fingerprint(program: Any, registry: Any) -> str:
    """A hash of all that a captured program says: its nodes with their values' shapes, and its constants."""
    digest = hashlib.sha256(f"{registry.opset_version} {program.graph_signature}".encode())
    digest.update(f"{program.range_constraints}".encode())
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                value = node.meta.get("val")
                said = f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {value}\n"
                digest.update(said.encode())
    for name, tensor in {**program.constants, **program.state_dict}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not isinstance(tensor, torch._subclasses.FakeTensor) and not tensor.is_meta:
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
