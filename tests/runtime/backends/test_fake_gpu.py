"""The GPU that is not there has the rules of a real one: breaking any of them is noticed."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

import fake_cuda
import fake_tensorrt
from fake_cuda import STREAM, CUresult, Fault, Gpu

OK, FLOAT = CUresult.CUDA_SUCCESS, onnx.TensorProto.FLOAT


@pytest.fixture
def gpu():
    return Gpu(total=1 << 20)


@pytest.fixture
def driver(gpu):
    made = gpu.driver()
    made.cuCtxSetCurrent("context")
    return made


def test_memory_that_was_freed_cannot_be_used(gpu, driver):
    _, address = driver.cuMemAlloc(64)
    driver.cuMemsetD8Async(address, 0, 64, STREAM)
    driver.cuMemFree(address)
    with pytest.raises(Fault, match="freed, and is used"):
        driver.cuStreamSynchronize(STREAM)
    with pytest.raises(Fault, match="not allocated"):
        driver.cuMemFree(address)


def test_nothing_is_written_beyond_an_allocation(gpu, driver):
    _, address = driver.cuMemAlloc(64)
    driver.cuMemsetD8Async(address + 1, 0, 64, STREAM)
    with pytest.raises(Fault, match="not in one allocation"):
        driver.cuStreamSynchronize(STREAM)


def test_new_memory_is_not_a_number(gpu, driver):
    _, address = driver.cuMemAlloc(64)
    assert np.isnan(gpu.view(address, 64).view(np.float16)).all()
    assert np.isnan(gpu.view(address, 64).view(np.float32)).all()


def test_memory_is_limited(driver):
    assert driver.cuMemAlloc(2 << 20)[0] == CUresult.CUDA_ERROR_OUT_OF_MEMORY
    assert driver.cuMemAlloc(0)[0] == CUresult.CUDA_ERROR_INVALID_VALUE


def test_a_copy_is_done_when_the_stream_is_waited_for(gpu, driver):
    _, address = driver.cuMemAlloc(4)
    _, pinned = driver.cuMemAllocHost(4)
    gpu.host(pinned, 4)[:] = [1, 2, 3, 4]
    driver.cuMemcpyHtoDAsync(address, pinned, 4, STREAM)
    assert gpu.view(address, 4).tolist() == [255] * 4
    gpu.host(pinned, 4)[:] = 7  # too early
    driver.cuStreamSynchronize(STREAM)
    assert gpu.view(address, 4).tolist() == [7] * 4


def test_copies_need_pinned_memory(gpu, driver):
    _, address = driver.cuMemAlloc(4)
    driver.cuMemcpyDtoHAsync(np.zeros(4, np.uint8).ctypes.data, address, 4, STREAM)
    with pytest.raises(Fault, match="not pinned"):
        driver.cuStreamSynchronize(STREAM)


def test_work_goes_to_the_stream(driver):
    with pytest.raises(Fault, match="another stream"):
        driver.cuMemsetD8Async(0, 0, 1, 0)


def test_a_thread_says_which_gpu_it_uses(gpu):
    assert gpu.driver().cuMemAlloc(4)[0] == CUresult.CUDA_ERROR_INVALID_CONTEXT


@pytest.mark.parametrize("call", [("cuMemAlloc", 4), ("cuStreamSynchronize", STREAM), ("cuMemAllocHost", 4)])
def test_nothing_waits_or_allocates_while_the_stream_is_captured(driver, call):
    driver.cuStreamBeginCapture(STREAM, 1)
    assert getattr(driver, call[0])(*call[1:])[0] == CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    assert driver.cuStreamEndCapture(STREAM)[0] == CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    assert getattr(driver, call[0])(*call[1:])[0] == OK


def test_what_was_captured_runs_when_it_is_launched_and_where_it_was(gpu, driver):
    _, address = driver.cuMemAlloc(4)
    driver.cuStreamBeginCapture(STREAM, 1)
    driver.cuMemsetD8Async(address, 5, 4, STREAM)
    _, graph = driver.cuStreamEndCapture(STREAM)
    _, ready = driver.cuGraphInstantiate(graph, 0)
    driver.cuStreamSynchronize(STREAM)
    assert gpu.view(address, 4).tolist() == [255] * 4
    for _ in range(2):
        driver.cuMemsetD8Async(address, 1, 4, STREAM)
        driver.cuGraphLaunch(ready, STREAM)
        driver.cuStreamSynchronize(STREAM)
        assert gpu.view(address, 4).tolist() == [5] * 4
    driver.cuMemFree(address)
    driver.cuGraphLaunch(ready, STREAM)
    with pytest.raises(Fault, match="freed"):
        driver.cuStreamSynchronize(STREAM)


@pytest.fixture
def trt(gpu, monkeypatch):
    return fake_tensorrt.install(monkeypatch, gpu)


class Log(fake_tensorrt.ILogger):
    def __init__(self):
        super().__init__()
        self.said = []

    def log(self, severity, message):
        self.said.append(message)


def add(folder, in_place=False):
    """y = x + n, x [S], and n a count; or a past that is written in place."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    size = [4] if in_place else ["S"]
    x, y = ("past_key_values.0.key", "present.0.key") if in_place else ("x", "y")
    nodes = [make("Cast", ["n"], ["f"], to=FLOAT), make("Add", [x, "f"], [y])]
    inputs = [info(x, FLOAT, size), info("n", onnx.TensorProto.INT64, [])]
    graph = onnx.helper.make_graph(nodes, "add", inputs, [info(y, FLOAT, size)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)
    onnx.save(model, folder / "add.onnx")
    return folder / "add.onnx"


@pytest.fixture
def engine(trt, tmp_path):
    def make(**changes):
        onnx_file = add(tmp_path, changes.pop("in_place", False))
        profiles = [{"x": ([1], [4]), "n": ([0], [9])}, {"x": ([5], [8])}]
        told = {"sm": 86, "version": "10.16.1", "profiles": profiles, "shape_inputs": ["n"], **changes}
        runtime = trt.Runtime(Log())
        made = runtime.deserialize_cuda_engine(fake_tensorrt.engine_bytes(onnx_file, **told))
        return made if made is not None else runtime.log.said

    return make


def managed(trt, engine):
    return engine.create_execution_context(strategy=trt.ExecutionContextAllocationStrategy.USER_MANAGED)


@pytest.fixture
def ready(trt, gpu, driver, engine):
    """A context that lacks nothing, its input on the GPU, and what must be kept."""
    made = engine()
    context = managed(trt, made)
    assert context.set_optimization_profile_async(0, STREAM)
    assert context.set_input_shape("x", (3,))
    assert context.set_input_shape("n", ())
    addresses = [driver.cuMemAlloc(4096)[1] for _ in range(3)]
    gpu.view(addresses[0], 12).view(np.float32)[:] = [1, 2, 3]
    count = np.array(2, np.int64)
    for name, address in zip("xyn", (*addresses[:2], count.ctypes.data), strict=True):
        assert context.set_tensor_address(name, address)
    context.set_device_memory(addresses[2], 4096)
    return context, addresses, count


def test_an_engine_reads_and_writes_where_it_is_told(gpu, driver, ready):
    context, addresses, count = ready
    assert context.infer_shapes() == []
    assert context.get_tensor_shape("y") == (3,)
    assert context.execute_async_v3(STREAM)
    count[...] = 9  # read already
    assert np.isnan(gpu.view(addresses[1], 12).view(np.float32)).all()
    driver.cuStreamSynchronize(STREAM)
    assert gpu.view(addresses[1], 12).view(np.float32).tolist() == [3, 4, 5]


def test_shapes_and_counts_stay_inside_the_profile(ready):
    context, _, count = ready
    assert not context.set_input_shape("x", (5,))
    assert not context.set_input_shape("x", (3, 1))
    count[...] = 10
    assert not context.execute_async_v3(STREAM)
    assert context.set_optimization_profile_async(1, STREAM)
    assert not context.execute_async_v3(STREAM)  # shapes are set anew
    assert not context.set_input_shape("x", (4,))
    assert context.set_input_shape("x", (5,))
    with pytest.raises(RuntimeError, match="set optimization profile"):
        context.set_optimization_profile_async(2, STREAM)
    assert len(context.engine.runtime.log.said) == 6


def test_a_profile_comes_before_shapes(trt, engine):
    with pytest.raises(Fault, match="before the profile"):
        managed(trt, engine()).set_input_shape("x", (3,))


@pytest.mark.parametrize("name", ["x", "y", "n"])
def test_every_address_is_set(ready, name):
    context = ready[0]
    del context.addresses[name]
    assert not context.execute_async_v3(STREAM)
    assert not context.set_tensor_address(name, 0)


def test_counts_are_in_host_memory_and_all_else_on_the_gpu(ready):
    context, addresses, count = ready
    with pytest.raises(Fault, match="n is in the wrong memory"):
        context.set_tensor_address("n", addresses[0])
    with pytest.raises(Fault, match="x is in the wrong memory"):
        context.set_tensor_address("x", count.ctypes.data)


def test_a_context_has_memory_to_run_in(trt, ready, engine):
    context, addresses, _ = ready
    with pytest.raises(Fault, match="memory of a context"):
        context.set_device_memory(addresses[2], 100)
    with pytest.raises(Fault, match="memory of a context"):
        context.set_device_memory(addresses[2] + 1, 4096)
    context.memory = None
    with pytest.raises(Fault, match="without memory"):
        context.execute_async_v3(STREAM)
    with pytest.raises(Fault, match="memory of its own"):
        engine().create_execution_context()


def test_freed_inputs_are_noticed_when_the_engine_runs(driver, ready):
    context, addresses, _ = ready
    context.execute_async_v3(STREAM)
    driver.cuMemFree(addresses[0])
    with pytest.raises(Fault, match="freed"):
        driver.cuStreamSynchronize(STREAM)


def test_what_is_written_in_place_is_at_the_place_of_its_past(trt, gpu, driver, engine):
    context = managed(trt, engine(in_place=True, profiles=[], scratch=0))
    context.set_optimization_profile_async(0, STREAM)
    context.set_input_shape("past_key_values.0.key", (4,))
    context.set_input_shape("n", ())
    addresses, count = [driver.cuMemAlloc(16)[1] for _ in range(2)], np.array(1, np.int64)
    gpu.view(addresses[0], 16).view(np.float32)[:] = 1
    names = ("past_key_values.0.key", "present.0.key", "n")
    for name, address in zip(names, (*addresses, count.ctypes.data), strict=True):
        context.set_tensor_address(name, address)
    with pytest.raises(Fault, match="written in place"):
        context.execute_async_v3(STREAM)
    context.set_tensor_address("present.0.key", addresses[0])
    assert context.execute_async_v3(STREAM)
    driver.cuStreamSynchronize(STREAM)
    assert gpu.view(addresses[0], 16).view(np.float32).tolist() == [2] * 4


def test_a_context_is_not_changed_after_it_was_captured(driver, ready):
    context, addresses, _ = ready
    driver.cuStreamBeginCapture(STREAM, 1)
    assert not context.execute_async_v3(STREAM)  # its first run
    assert driver.cuStreamEndCapture(STREAM)[0] != OK
    context.execute_async_v3(STREAM)
    driver.cuStreamSynchronize(STREAM)
    driver.cuStreamBeginCapture(STREAM, 1)
    assert context.execute_async_v3(STREAM)
    _, recorded = driver.cuGraphInstantiate(driver.cuStreamEndCapture(STREAM)[1], 0)
    driver.cuGraphLaunch(recorded, STREAM)
    driver.cuStreamSynchronize(STREAM)
    context.set_tensor_address("x", addresses[0])
    driver.cuGraphLaunch(recorded, STREAM)
    with pytest.raises(Fault, match="changed after it was captured"):
        driver.cuStreamSynchronize(STREAM)


def test_an_engine_is_of_its_gpu_and_version_and_has_room(gpu, engine):
    assert "incompatible device" in engine(sm=89)[0]
    assert "incompatible device" in engine(version="10.15")[0]
    assert "OutOfMemory" in engine(size=2 << 20)[0]
    before = gpu.used
    made = engine(size=1 << 18)
    assert gpu.used == before + (1 << 18)
    del made
    assert gpu.used == before


def test_the_logger_is_begun(trt):
    class Idle(fake_tensorrt.ILogger):
        def __init__(self):
            pass

    with pytest.raises(Fault, match="__init__"):
        trt.Runtime(Idle())


def test_the_real_driver_has_the_same_functions():
    real = pytest.importorskip("cuda.bindings.driver")
    fake = Gpu().driver()
    for kind in (fake_cuda.CUdevice_attribute, CUresult, fake_cuda.CUstream_flags):
        for value in kind:
            assert int(getattr(getattr(real, kind.__name__), value.name)) == value, value
    for name in [name for name in dir(fake) if name.startswith("cu") and name[2].isupper()]:
        function = getattr(fake_cuda._Driver, name)
        mine = list(inspect.signature(function).parameters)[1:]
        theirs = re.match(rf"{name}\((.*)\)", getattr(real, name).__doc__).group(1)
        assert [one.split(":")[0].split()[-1] for one in theirs.split(",") if one.strip()] == mine, name


def test_the_real_tensorrt_has_the_same_calls():
    real = pytest.importorskip("tensorrt_rtx")
    for name, fake in (
        ("Runtime", fake_tensorrt.Runtime),
        ("ICudaEngine", fake_tensorrt.CudaEngine),
        ("IExecutionContext", fake_tensorrt.ExecutionContext),
    ):
        public = [n for n, f in vars(fake).items() if inspect.isfunction(f) and not n.startswith("_")]
        for method in [n for n in public if n != "in_place"]:
            told = getattr(getattr(real, name), method).__doc__
            for parameter in list(inspect.signature(getattr(fake, method)).parameters)[1:]:
                if method != "get_tensor_name" and parameter != "stream":
                    assert f"{parameter}:" in told, (name, method, parameter)
    assert {"num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"} <= set(
        dir(real.ICudaEngine)
    )
    for kind in (fake_tensorrt.TensorIOMode, fake_tensorrt.TensorLocation):
        for value in kind:
            assert hasattr(getattr(real, kind.__name__), value.name)
    assert hasattr(real.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert {"ERROR", "INTERNAL_ERROR"} <= set(dir(real.ILogger))
