"""Tracing made quicker for tests: what was traced once in a process need not be traced again.

The tests export a few tiny models many times. Two steps are remembered, by all that their results depend on:

- `trace` of a module, by its structure, configuration, small weights, inputs, outputs and target;
- the translation of a captured program into ONNX, by a hash of this program. It serves models of one
  structure with other weights.

Large weights are no part of either: they are attached when a graph is written.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")

__all__ = ["_collected", "_quick_traces"]


@pytest.fixture(autouse=True, scope="session")
def _quick_traces():
    """Remember traces and translations, and let torch gather its operators once, not for every graph."""
    from torch._export import utils
    from torch.onnx._internal.exporter import _core, _registration

    from visprune.export.graph import trace

    if isinstance(trace.trace, Traces):
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

    translations = Translations(_core)
    utils._materialize_cpp_cia_ops()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        patch.setattr(utils, "_materialize_cpp_cia_ops", lambda: None)
        patch.setattr(_core, "_prepare_exported_program_for_export", translations.prepare)
        patch.setattr(_core, "_exported_program_to_onnx_program", translations.translate)
        patch.setattr(trace, "trace", Traces(trace))
        yield


@pytest.fixture(autouse=True, scope="module")
def _collected():
    """What is imported stays; a collector that looks through it again and again takes another tenth."""
    gc.collect()
    gc.freeze()


class Traces:
    """`visprune.export.graph.trace.trace` with a memory."""

    def __init__(self, module: Any) -> None:
        self._trace, self._small = module.trace, module.is_small
        self._named_tensors = module.named_tensors
        self._models: dict[str, Any] = {}

    def __call__(self, skeleton, module, weights, inputs, outputs, target, fake):
        digest = hashlib.sha256(f"{inputs} {outputs} {target}".encode())
        digest.update(structure(skeleton).encode())
        for name, tensor in self._named_tensors(module).items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if self._small(tensor):
                digest.update(content(weights.read(tensor)))
        key = digest.hexdigest()
        if key not in self._models:
            self._models[key] = self._trace(skeleton, module, weights, inputs, outputs, target, fake).clone()
        return self._models[key].clone()


class Translations:
    """The second and third step of PyTorch's exporter, with a memory in between."""

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


def structure(module: Any) -> str:
    """All that a module's forward depends on but its tensors: classes and attributes of its submodules."""
    found = []
    for name, part in module.named_modules():
        kind = type(part)
        found.append(f"{name}: {kind.__module__}.{kind.__qualname__} {id(kind)}")
        for key, value in sorted(vars(part).items()):
            if not key.startswith(("_parameters", "_buffers", "_modules", "_backward", "_forward", "_state")):
                found.append(f" {key}={described(value)}")
    return "\n".join(found)


def described(value: Any) -> str:
    """A value as text; of a configuration the attention too, which its own text leaves out."""
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__qualname__}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__} {id(type(value))} {vars_of(value)}"
    if isinstance(value, (list, tuple)):
        return f"{[described(item) for item in value]}"
    return f"{value!r} {getattr(value, '_attn_implementation', '')}"


def vars_of(value: Any) -> dict[str, str]:
    return {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}


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
        digest.update(content(tensor))
    return digest.hexdigest()


def content(tensor: Any) -> bytes:
    """The numbers of a tensor; of one without any, nothing."""
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta:
        return b""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
