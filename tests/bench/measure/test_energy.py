"""Counters of energy, on directories and programs that look like theirs."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from visprune.bench.measure.energy import NoCounter, Rapl, Tegrastats, counter, watts
from visprune.bench.measure.gpu import NvmlGpu

ORIN_NX = (
    "11-21-2026 15:36:15 RAM 3134/15823MB (lfb 4x4MB) SWAP 0/7912MB CPU [0%@729,2%@729] GR3D_FREQ 0% "
    "cpu@47.3C VDD_IN 5128mW/4874mW VDD_CPU_GPU_CV 602mW/562mW VDD_SOC 1484mW/1421mW"
)
AGX_ORIN = (
    "RAM 2448/30536MB GR3D_FREQ 0% VDD_GPU_SOC 2408mW/2400mW VDD_CPU_CV 401mW/400mW VIN_SYS_5V0 3225mW/1mW"
)
NANO = "RAM 1500/3964MB POM_5V_IN 1522/1500 POM_5V_GPU 40/40 POM_5V_CPU 120/100"


def zone(root: Path, name: str, kind: str, energy: int, most: int = 1_000_000) -> Path:
    path = root / name
    path.mkdir()
    (path / "name").write_text(f"{kind}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


@pytest.fixture
def no_tegrastats(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "power"), [(ORIN_NX, 5.128), (AGX_ORIN, 6.034), (NANO, 1.522), ("RAM 1/2MB", 0.0)]
)
def test_the_power_of_a_board_is_that_of_its_input_or_of_all_its_rails(line, power):
    assert watts(line) == pytest.approx(power)


@pytest.mark.usefixtures("no_tegrastats")
def test_rapl_adds_up_the_packages_and_survives_an_overflow(tmp_path):
    root = tmp_path / "powercap"
    root.mkdir()
    first = zone(root, "intel-rapl:0", "package-0", 900_000)
    second = zone(root, "intel-rapl:1", "package-1", 100)
    zone(root, "intel-rapl:0:0", "core", 5)
    zone(root, "intel-rapl:2", "psys", 5)
    with counter(None, root) as found:
        assert isinstance(found, Rapl)
        assert found.about == "RAPL, 2 processor packages"
        assert found.joules() == 0.0
        (first / "energy_uj").write_text("150000")  # began anew: 250,000 more
        (second / "energy_uj").write_text("500100")
        assert found.joules() == pytest.approx(0.75)
        assert found.joules() == pytest.approx(0.75)


@pytest.mark.usefixtures("no_tegrastats")
def test_where_nothing_counts_that_is_said(tmp_path):
    with counter(None, tmp_path / "none") as found:
        assert isinstance(found, NoCounter)
        assert (found.joules(), found.about) == (None, "no counter: neither RAPL, NVML nor tegrastats")


def test_tegrastats_is_added_up_while_it_runs(monkeypatch, tmp_path):
    program = tmp_path / "tegrastats"
    program.write_text(f"#!/bin/sh\nwhile true; do echo '{ORIN_NX}'; sleep 0.02; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with counter(None, tmp_path / "none") as found:
        assert isinstance(found, Tegrastats)
        start = time.perf_counter()
        while not found.joules():
            time.sleep(0.01)
        time.sleep(0.2)
        assert 0 < found.joules() <= 5.128 * (time.perf_counter() - start + 5)
        assert "tegrastats" in found.about


SUCCESS, NOT_SUPPORTED, INSUFFICIENT_SIZE, UNKNOWN = 0, 3, 7, 2**64 - 1


@pytest.fixture
def fresh_bindings() -> Iterator[None]:
    """Have the test import pynvml again: it keeps the functions of the driver that it loaded first."""
    before = pytest.importorskip("pynvml")
    del sys.modules["pynvml"]
    yield
    sys.modules["pynvml"] = before


@pytest.fixture
def driver(monkeypatch, fresh_bindings) -> SimpleNamespace:
    """The C functions of a driver with one GPU, under the real bindings.

    Arguments are ctypes objects, results are error codes. A test may replace a function or delete it.
    """

    def name(_handle, text, _length):
        text.value = b"A GPU"
        return SUCCESS

    def energy(_handle, millijoules):
        millijoules._obj.value = 4_500
        return SUCCESS

    def processes(_handle, count, infos):
        if count._obj.value < 2:
            count._obj.value = 2
            return INSUFFICIENT_SIZE
        count._obj.value = 2
        infos[0].pid, infos[0].usedGpuMemory = 41, UNKNOWN
        infos[1].pid, infos[1].usedGpuMemory = 42, 1_000_000
        return SUCCESS

    functions = SimpleNamespace(
        nvmlInitWithFlags=lambda _flags: SUCCESS,
        nvmlDeviceGetHandleByIndex_v2=lambda index, _handle: SUCCESS if index.value == 0 else NOT_SUPPORTED,
        nvmlDeviceGetName=name,
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetComputeRunningProcesses_v3=processes,
    )
    monkeypatch.setattr("ctypes.CDLL", lambda library: {"libnvidia-ml.so.1": functions}[library])
    return functions


def test_the_driver_tells_name_energy_and_memory(driver, tmp_path):
    gpu = NvmlGpu.find()
    assert (gpu.name, gpu.joules()) == ("A GPU", 4.5)
    assert [gpu.process_bytes(pid) for pid in (41, 42, 43)] == [None, 1_000_000, None]
    with counter(gpu, tmp_path / "none") as found:
        assert (found.about, found.joules()) == ("NVML, A GPU", 4.5)


def test_a_driver_that_knows_little_is_no_error(driver):
    driver.nvmlDeviceGetName = lambda *_: NOT_SUPPORTED
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda *_: NOT_SUPPORTED
    del driver.nvmlDeviceGetComputeRunningProcesses_v3  # an old driver
    gpu = NvmlGpu.find()
    assert (gpu.name, gpu.joules(), gpu.process_bytes(42)) == (None, None, None)


def test_a_driver_without_a_gpu(driver):
    driver.nvmlDeviceGetHandleByIndex_v2 = lambda *_: NOT_SUPPORTED
    assert NvmlGpu.find() is None


@pytest.mark.usefixtures("no_tegrastats")
def test_without_the_bindings_nothing_is_known_of_a_gpu_and_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # Python's own way to make an import fail
    gpu = NvmlGpu.find()
    assert (gpu.name, gpu.joules(), gpu.process_bytes(42)) == (None, None, None)
    with counter(gpu, tmp_path / "none") as found:
        assert found.about == "no counter: the package nvidia-ml-py is not installed"


@pytest.mark.usefixtures("no_tegrastats")
def test_a_gpu_that_counts_no_energy(monkeypatch, tmp_path, driver):
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda *_: NOT_SUPPORTED
    silent = NvmlGpu.find()
    with counter(silent, tmp_path / "none") as found:
        assert found.about == "no counter: this GPU has none"
    program = tmp_path / "tegrastats"
    program.write_text(f"#!/bin/sh\necho '{ORIN_NX}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with counter(silent, tmp_path / "none") as found:
        assert isinstance(found, Tegrastats)  # a Jetson, where NVML may know the GPU


def test_the_energy_of_lines_is_power_by_time():
    found = Tegrastats(io.StringIO(f"{AGX_ORIN}\n" * 3))
    while not found.joules():
        time.sleep(0.001)
    assert 0 < found.joules() < 6.034


@pytest.mark.usefixtures("fresh_bindings")
def test_a_machine_without_a_driver_has_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert NvmlGpu.find() is None
