"""Engines of TensorRT and TensorRT-RTX, run with the calls that both packages share.

This module knows graphs, engines and their profiles. It hides that a cache is written in place: the values of
the cache look like those of other backends. It has never run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visprune.cache_names import PAST
from visprune.errors import BundleError, InputError, UnsupportedError, VispruneError
from visprune.manifest import Engine, Graph
from visprune.runtime.backends.arrays import Array, CacheArray, RankedLogits
from visprune.runtime.backends.device import Block, Device, DeviceMemoryError
from visprune.runtime.backends.engine_limits import choose_profile
from visprune.runtime.backends.recordings import Key, Recordings
from visprune.runtime.backends.runner import Runner, Specs, Value, shape_of, to_numpy

__all__ = ["TrtRunner", "cache_capacity"]

_SMALL = 1 << 20  # bytes of the largest input whose copy on the GPU keeps its address
_LENGTH, _TOKEN = "cache_length", "greedy_token"
_PRESENT = "present."


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An input or output of one run: on the GPU, or in host memory if shapes depend on its values."""

    shape: tuple[int, ...]
    memory: Block | NDArray[Any]

    @property
    def address(self) -> int:
        return self.memory.address if isinstance(self.memory, Block) else int(self.memory.ctypes.data)

    @property
    def key(self) -> Key:
        """Part of a recording's key: the shape, and the address on the GPU or the value in host memory."""
        known = self.memory.address if isinstance(self.memory, Block) else self.memory.tobytes()
        return (self.shape, known)


def cache_capacity(engine: Engine, interface: Graph) -> int | None:
    """Return how many tokens the cache of each layer of an engine can hold; None if it has no cache."""
    if engine.cache_capacity:
        return engine.cache_capacity
    for spec in interface.inputs:
        if spec.name.startswith(PAST):
            known = [p.inputs[spec.name].most[2] for p in engine.profiles if spec.name in p.inputs]
            return 1 + max(known) if known else None
    return None


class TrtRunner:
    """One engine.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        device: The GPU.
        engine: The manifest's entry of the engine.
        interface: The manifest's entry of the graph.
        content: The serialized engine.

    Raises:
        BundleError: TensorRT cannot load the engine, or the engine differs from the manifest.
        DeviceMemoryError: The GPU has too little memory.
    """

    def __init__(
        self, trt: ModuleType, device: Device, engine: Engine, interface: Graph, content: Any
    ) -> None:
        self._trt, self._device, self._entry, self._interface = trt, device, engine, interface
        self._log = _error_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine: Any = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise self._failure(f"cannot load {engine.file}", len(content))
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        self._dtypes = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._check()
        self._scratch_size = int(self._engine.device_memory_size_v2)
        device.scratch(self._scratch_size)
        self._contexts: dict[int, Any] = {}  # by profile
        self._copies: dict[str, Block] = {}  # memory that each input from the host was last copied to
        # The key of the last inputs, and the shapes of their outputs.
        self._last_shapes: tuple[Key, dict[str, tuple[int, ...]]] = ((), {})
        self._last_outputs: dict[str, int] = {}  # addresses of the last outputs
        self._recordings = Recordings(device, engine.graph)

    @property
    def specs(self) -> Specs:
        """Inputs and outputs of the graph, from the manifest."""
        return Specs(
            self._interface.inputs, self._interface.outputs, cache_capacity(self._entry, self._interface)
        )

    def infer(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the engine; see `Runner.infer`. The work is done when this returns.

        Raises:
            InputError: An input is too large or too small for the engine.
            DeviceMemoryError: The GPU has too little memory.
            UnsupportedError: TensorRT or CUDA failed.
        """
        self._device.enter()
        fed = {name: _count_value(value) or shape_of(value) for name, value in feeds.items()}
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        length = self._begin_cache(feeds) if self._entry.cache_capacity else 0
        fed |= {name: value.buffer_shape for name, value in feeds.items() if isinstance(value, CacheArray)}
        profile = choose_profile(self._entry.profiles, self._entry.graph, self._interface, fed)
        tensors = {name: self._input(name, feeds[name]) for name in self._inputs}
        for name, shape in self._output_shapes(profile, tensors).items():
            tensors[name] = _Tensor(shape, self._output_block(name, shape, tensors))
        self._run(profile, tensors)
        self._device.synchronize()
        self._last_outputs = {name: tensors[name].address for name in self._outputs}
        return self._results(tensors, length)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.enter()
        self._recordings.close()
        self._contexts, self._copies = {}, {}
        self._engine = self._runtime = None
        self._device.release()

    def _check(self) -> None:
        """Refuse an engine whose interface differs from that of its graph in the manifest."""
        cached = bool(self._entry.cache_capacity)
        told = {spec.name: spec.dtype for spec in (*self._interface.inputs, *self._interface.outputs)}
        told |= {_TOKEN: "int64"} | ({_LENGTH: "int64"} if cached else {})
        found = {name: dtype.name for name, dtype in self._dtypes.items()}
        # TensorRT may drop an input that nothing reads. Only some engines have the token as an output.
        missing = {spec.name for spec in self._interface.outputs} - found.keys()
        odd = {name for name in found if found[name] != told.get(name)} | missing
        profiles = max(1, len(self._entry.profiles))
        if odd or self._engine.num_optimization_profiles != profiles:
            what = f"of {min(odd)!r}" if odd else "of its profiles"
            raise BundleError(
                f"The engine {self._entry.file} does not fit the manifest, because {what}.",
                "Copy the bundle again, or build its engines again.",
            )

    def _begin_cache(self, feeds: dict[str, Value]) -> int:
        """Replace the past in `feeds` by buffers. Return how many tokens the cache holds after this run."""
        past = {name: value for name, value in feeds.items() if name.startswith(PAST)}
        lengths = {shape_of(value)[2] for value in past.values()}
        if len(lengths) != 1:  # tokens are dropped between graphs, never within one that writes in place
            raise self._failure(f"cannot run {self._entry.graph}, whose layers hold different tokens")
        (length,) = lengths
        feeds |= {name: self._buffer(name, value) for name, value in past.items()}
        feeds[_LENGTH] = np.array([length], np.int64)
        after = length + self._new_tokens(feeds)
        if after > self._entry.cache_capacity:  # the engine would overwrite the memory of another tensor
            raise InputError(
                f"The engine of {self._entry.graph} has room for {self._entry.cache_capacity} tokens in "
                f"its cache, and {after} are needed.",
                "Start a new conversation, or build engines with a larger --max-cache (visprune-build).",
            )
        return after

    def _new_tokens(self, feeds: Mapping[str, Value]) -> int:
        """Return the number of tokens in this run, S."""
        for spec in self._interface.inputs:
            if "S" in spec.shape and spec.name in feeds:
                return shape_of(feeds[spec.name])[spec.shape.index("S")]
        return 0

    def _buffer(self, name: str, value: Value) -> CacheArray:
        """Return the cache of one layer in a buffer that is written in place; copied there if it is not."""
        buffer = tuple(self._engine.get_tensor_shape(name))
        if isinstance(value, CacheArray) and value.buffer_shape == buffer:
            return value
        held = to_numpy(value)
        dtype = self._dtypes[name]
        block = self._device.take(prod(buffer) * dtype.itemsize)
        if held.shape[2] == 0:
            self._device.clear(block)  # the unused part is multiplied by 0, so it must be finite
        else:
            whole = np.zeros(buffer, dtype)
            whole[:, :, : held.shape[2]] = held
            self._device.upload(whole, block)
        return CacheArray(self._device, block, buffer, dtype, held.shape[2])

    def _input(self, name: str, value: Value) -> _Tensor:
        """Return an input at the place where the engine reads it, copied there if needed."""
        if self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:
            known = np.ascontiguousarray(to_numpy(value), self._dtypes[name]).reshape(shape_of(value))
            return _Tensor(known.shape, known)
        if isinstance(value, CacheArray):
            return _Tensor(value.buffer_shape, value.block)
        if isinstance(value, Array):
            return _Tensor(value.shape(), value.block)
        array, block = to_numpy(value), self._copies.get(name)
        if block is None or block.size < array.nbytes:
            block = self._device.take(array.nbytes)
        if array.nbytes <= _SMALL:  # inputs of a decoding step keep their address, so that it can be captured
            self._copies[name] = block
        self._device.upload(array, block)
        return _Tensor(array.shape, block)

    def _output_shapes(self, profile: int, tensors: Mapping[str, _Tensor]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each output, which the engine infers from the inputs."""
        counts = [t.key for t in tensors.values() if not isinstance(t.memory, Block)]
        asked = (profile, tuple(tensor.shape for tensor in tensors.values()), *counts)
        if asked != self._last_shapes[0]:
            context = self._context(profile)
            self._bind(context, tensors)
            found = {}
            if _call_or_none(context.infer_shapes) == []:  # no input is missing
                found = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
            if not found or any(dim < 0 for shape in found.values() for dim in shape):
                raise self._failure(f"cannot infer the output shapes of {self._entry.file}")
            self._last_shapes = (asked, found)
        return self._last_shapes[1]

    def _output_block(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, _Tensor]) -> Block:
        """Return the memory of an output. A cache that is written in place uses that of the past."""
        if self._entry.cache_capacity and name.startswith(_PRESENT):
            memory = tensors[PAST + name.removeprefix(_PRESENT)].memory
            assert isinstance(memory, Block)
            return memory
        return self._device.take(prod(shape) * self._dtypes[name].itemsize, self._last_outputs.get(name, 0))

    def _run(self, profile: int, tensors: Mapping[str, _Tensor]) -> None:
        """Queue the work on the stream; as a CUDA graph if the same work was captured before."""
        scratch = self._device.scratch(self._scratch_size)
        key: Key = (profile, scratch.address, *(tensor.key for tensor in tensors.values()))
        if self._recordings.launch(key):
            return
        own = self._recording_context(profile) if self._recordings.repeats(key) else None
        context = own or self._context(profile)
        self._bind(context, tensors)
        if self._scratch_size:
            context.set_device_memory(scratch.address, scratch.size)
        self._execute(context)
        if own:
            self._recordings.capture(key, own, lambda: self._execute(own))

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream):
            raise self._failure(f"cannot run {self._entry.file}")

    def _bind(self, context: Any, tensors: Mapping[str, _Tensor]) -> None:
        """Give a context the shapes of the inputs and the addresses of all tensors."""
        for name, tensor in tensors.items():
            shaped = name in self._outputs or context.set_input_shape(name, tensor.shape)
            if not shaped or not context.set_tensor_address(name, tensor.address):
                raise self._failure(f"cannot set {name} {list(tensor.shape)} of {self._entry.file}")

    def _recording_context(self, profile: int) -> Any:
        """Create a context for a recording; None if there is no memory for one more."""
        try:
            return self._new_context(profile)
        except VispruneError as error:
            self._recordings.give_up(error)
            return None

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int) -> Any:
        """Create a context without working memory of its own: all contexts share the device's."""
        strategy, stream = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED, self._device.stream
        context = self._engine.create_execution_context(strategy=strategy)
        if context is None and self._device.trim():
            context = self._engine.create_execution_context(strategy=strategy)
        if context is None or not _call_or_none(context.set_optimization_profile_async, profile, stream):
            raise self._failure(f"cannot create a context for {self._entry.file}")
        return context

    def _results(self, tensors: Mapping[str, _Tensor], length: int) -> dict[str, Value]:
        """Return the graph's outputs as values of the runtime."""
        found: dict[str, Value] = {}
        for name in self._outputs:
            tensor, dtype = tensors[name], self._dtypes[name]
            assert isinstance(tensor.memory, Block)
            if self._entry.cache_capacity and name.startswith(_PRESENT):
                found[name] = CacheArray(self._device, tensor.memory, tensor.shape, dtype, length)
            else:
                found[name] = Array(self._device, tensor.memory, tensor.shape, dtype)
        token, logits = found.pop(_TOKEN, None), found.get("logits")
        if isinstance(token, Array) and isinstance(logits, Array):
            found["logits"] = RankedLogits(logits, token)
        return found

    def _failure(self, what: str, needed: int | None = None) -> BundleError | UnsupportedError:
        """Make an error of the messages that TensorRT logged since the last call; `needed` is in bytes."""
        logged = self._log.take() or "it did not say why"
        if "out of memory" in logged.lower() or "outofmemory" in logged.lower():
            return DeviceMemoryError(needed, self._device.free_memory())
        return BundleError(
            f"{self._trt.__name__} {self._trt.__version__} {what}: {logged}.",
            "Build the engines of this bundle again; if that does not help, report this message.",
        )


def _count_value(value: Value) -> tuple[int, ...]:
    """Return the value of a count, () for other inputs. Profiles have ranges of a count's value."""
    return (int(to_numpy(value)),) if shape_of(value) == () else ()


def _call_or_none(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call TensorRT and return the result; None if its bindings raise an error."""
    try:
        return call(*arguments)
    except RuntimeError:
        return None


def _error_log(trt: ModuleType) -> Any:
    """Return a logger that keeps TensorRT's last errors, for messages of visprune."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors = [*self._errors[-3:], " ".join(message.split()).rstrip(".")]

        def take(self) -> str:
            errors, self._errors = self._errors, []
            return "; ".join(errors)

    return Log()
