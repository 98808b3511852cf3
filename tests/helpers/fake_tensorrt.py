"""TensorRT without a GPU: the calls that the runtime makes, with its rules, computed by ONNX Runtime.

An engine file says which ONNX graph it is of, and what its profiles are. What runs reads its inputs from the
addresses that were set, and writes its outputs to those that were set. What the real one reports is reported
as it does, by False, None or a RuntimeError, and a line in the log; what it would not notice is a `Fault`.
"""

from __future__ import annotations

import enum
import json
import types
from functools import lru_cache
from importlib.machinery import ModuleSpec
from math import prod

import numpy as np
import onnxruntime as ort
from fake_cuda import STREAM, Fault, read_host

MAGIC = b"an engine of no GPU"
_TYPES = {"float": "float32", "float16": "float16", "int64": "int64", "int32": "int32", "bool": "bool"}


def engine_bytes(onnx, *, sm, version, profiles, shape_inputs=(), scratch=4096, size=0):
    """An engine file.

    Args:
        onnx: The path of the graph that it runs.
        profiles: For each, by input, the least and the most of its shape, or of its values.
        shape_inputs: Inputs whose values shapes depend on.
        scratch: Bytes that it needs while it runs.
        size: At least so many bytes; they count as weights.
    """
    told = {"onnx": str(onnx), "sm": sm, "version": version, "profiles": profiles}
    told |= {"shape_inputs": list(shape_inputs), "scratch": scratch}
    content = MAGIC + json.dumps(told).encode()
    return content + b" " * max(0, size - len(content))


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self):
        self._made = True


def install(monkeypatch, gpu, name="tensorrt", version="10.16.1", capturable=True):
    """Put it where `import` finds it."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__version__ = version
    for kind in (TensorIOMode, TensorLocation, ExecutionContextAllocationStrategy, ILogger):
        setattr(module, kind.__name__, kind)
    module.nptype = lambda dtype: np.dtype(dtype).type
    module.Runtime = lambda logger: Runtime(logger, gpu, version, capturable)
    monkeypatch.setitem(__import__("sys").modules, name, module)
    return module


class Runtime:
    def __init__(self, logger, gpu, version, capturable):
        if not getattr(logger, "_made", False):
            raise Fault("the logger's own __init__ was not called")
        self.log, self.gpu, self.version, self.capturable = logger, gpu, version, capturable

    def deserialize_cuda_engine(self, serialized_engine):
        content = bytes(serialized_engine)
        if not content.startswith(MAGIC):
            return self._error("Serialization assertion magicTag failed.")
        told = json.loads(content.removeprefix(MAGIC))
        if (told["sm"], told["version"]) != (self.gpu.sm, self.version):
            return self._error("The engine plan file is generated on an incompatible device.")
        if not self.gpu.reserve(len(content)):
            return self._error("Requested size exceeds what is free: OutOfMemory.")
        return CudaEngine(self, told, len(content))

    def _error(self, message):
        self.log.log(ILogger.ERROR, message)


@lru_cache(maxsize=64)
def _session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class CudaEngine:
    def __init__(self, runtime, told, weights):
        self.runtime, self.told, self.weights = runtime, told, weights
        self.session = _session(told["onnx"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.nodes = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.nodes)
        self.num_optimization_profiles = max(1, len(told["profiles"]))
        self.device_memory_size_v2 = told["scratch"]
        self.sizes = {}  # outputs' shapes, by what they depend on

    def __del__(self):
        if hasattr(self, "sizes"):
            self.runtime.gpu.used -= self.weights

    def get_tensor_name(self, index):
        return list(self.nodes)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return _TYPES[self.nodes[name].type.removeprefix("tensor(").removesuffix(")")]

    def get_tensor_shape(self, name):
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.nodes[name].shape)

    def get_tensor_location(self, name):
        return TensorLocation.HOST if name in self.told["shape_inputs"] else TensorLocation.DEVICE

    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Fault("a context takes memory of its own, which was not counted")
        return ExecutionContext(self)

    def in_place(self, name):
        """The input whose memory an output is written to, if there is one."""
        past = name.replace("present.", "past_key_values.")
        static = past in self.inputs and -1 not in self.get_tensor_shape(past)
        return past if name.startswith("present.") and static else None


class ExecutionContext:
    def __init__(self, engine):
        self.engine, self.gpu = engine, engine.runtime.gpu
        self.profile, self.memory, self.changes, self.runs = None, None, 0, 0
        self.shapes, self.addresses = {}, {}

    def is_stream_capturable(self, stream):
        return self.engine.runtime.capturable

    def set_optimization_profile_async(self, profile_index, stream_handle):
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            self._refuse(f"there is no profile {profile_index}")
            raise RuntimeError("Error in set optimization profile async.")
        self.profile, self.shapes = profile_index, {}
        return self._changed()

    def set_input_shape(self, name, shape):
        if self.profile is None:
            raise Fault("shapes are set before the profile")
        known = self.engine.get_tensor_shape(name)
        fits = len(shape) == len(known) and all(k in (-1, d) for k, d in zip(known, shape, strict=True))
        if not fits or (self._location(name) is TensorLocation.DEVICE and not self._inside(name, shape)):
            return self._refuse(f"{name} {list(shape)} is not in the profile {self.profile}")
        self.shapes[name] = tuple(shape)
        return self._changed()

    def set_tensor_address(self, name, memory):
        if not memory:
            return self._refuse(f"{name} is nowhere")
        if (self._location(name) is TensorLocation.DEVICE) != self.gpu.on_device(memory):
            raise Fault(f"{name} is in the wrong memory")
        self.addresses[name] = memory
        return self._changed()

    def set_device_memory(self, memory, size):
        if memory % 256 or size < self.engine.told["scratch"]:
            raise Fault(f"{size} bytes at {memory:#x} cannot be the memory of a context")
        self.memory = memory
        self._changed()

    def infer_shapes(self):
        counts = [name for name in self.engine.inputs if self._location(name) is TensorLocation.HOST]
        return [name for name in self.engine.inputs if name not in self.shapes] + [
            name for name in counts if name not in self.addresses
        ]

    def get_tensor_shape(self, name):
        if name in self.engine.inputs:
            return self.shapes.get(name, self.engine.get_tensor_shape(name))
        if self.infer_shapes():
            return self.engine.get_tensor_shape(name)
        return self._output_shapes(self._counts())[name]

    def execute_async_v3(self, stream_handle):
        if self.profile is None or self.infer_shapes():
            return self._refuse("shapes are not set")
        if lacking := self.engine.nodes.keys() - self.addresses.keys():
            return self._refuse(f"the address of {min(lacking)} is not set")
        if self.engine.told["scratch"] and self.memory is None:
            raise Fault("a context runs without memory")
        if stream_handle != STREAM:
            raise Fault("a context runs on another stream")
        if self.gpu.recording is not None and not self.runs:
            self.gpu.forbidden()  # the first run prepares things, and waits for them
            return self._refuse("a first run cannot be captured")
        counts = self._counts()
        for name, value in counts.items():
            if not self._inside(name, value.reshape(-1).tolist()):
                return self._refuse(f"{name} is {value}, which is not in the profile {self.profile}")
        for name in self.engine.outputs:
            past = self.engine.in_place(name)
            if past and self.addresses[name] != self.addresses[past]:
                raise Fault(f"{name} is written in place, and is elsewhere than {past}")
        self.runs += 1
        shapes = {**self.shapes, **self._output_shapes(counts)}
        addresses, memory, changes = dict(self.addresses), self.memory, self.changes

        captured = self.gpu.recording is not None

        def work():
            if captured and changes != self.changes:
                raise Fault("a context was changed after it was captured")
            self._compute(shapes, addresses, counts, memory)

        self.gpu.put(stream_handle, work)
        return True

    def _compute(self, shapes, addresses, counts, memory):
        if memory is not None:
            self.gpu.view(memory, self.engine.told["scratch"])[:] = 0xAB
        places = {
            name: self._view(name, shapes[name], addresses[name])
            for name in self.engine.nodes
            if name not in counts
        }
        feeds = {name: counts.get(name, places.get(name)) for name in self.engine.inputs}
        found = self.engine.session.run(list(self.engine.outputs), feeds)
        for name, value in zip(self.engine.outputs, found, strict=True):
            places[name][...] = value

    def _view(self, name, shape, address):
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        return self.gpu.view(address, prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def _counts(self):
        """What is in host memory, read now."""
        return {
            name: read_host(
                self.addresses[name], prod(self.shapes[name]), np.dtype(self.engine.get_tensor_dtype(name))
            ).reshape(self.shapes[name])
            for name in self.engine.inputs
            if self._location(name) is TensorLocation.HOST
        }

    def _output_shapes(self, counts):
        """By running the graph on zeros: no shape depends on more than the inputs' shapes and the counts."""
        key = (tuple(self.shapes.items()), *(value.tobytes() for value in counts.values()))
        if key not in self.engine.sizes:
            feeds = {
                name: counts.get(name, np.zeros(self.shapes[name], self.engine.get_tensor_dtype(name)))
                for name in self.engine.inputs
            }
            found = self.engine.session.run(list(self.engine.outputs), feeds)
            self.engine.sizes[key] = dict(zip(self.engine.outputs, (f.shape for f in found), strict=True))
        return self.engine.sizes[key]

    def _inside(self, name, values):
        profiles = self.engine.told["profiles"]
        least, most = profiles[self.profile].get(name, (None, None)) if profiles else (None, None)
        return least is None or all(a <= v <= b for a, v, b in zip(least, values, most, strict=True))

    def _location(self, name):
        return self.engine.get_tensor_location(name)

    def _changed(self):
        self.changes += 1
        return True

    def _refuse(self, message):
        self.engine.runtime.log.log(ILogger.ERROR, message)
        return False
