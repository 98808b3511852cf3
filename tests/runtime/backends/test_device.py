"""The device behind the engines, on the GPU that is not there, and wherever there is one on that too."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from fake_cuda import Gpu

from visprune.errors import VispruneError
from visprune.runtime.backends.device import Device, DeviceMemoryError

STAGING = 8 << 20


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "fake":
        Gpu().install(monkeypatch)
    try:
        made = Device()
    except VispruneError as error:
        pytest.skip(error.what)
    yield made
    made.release()


def drawn(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 513, STAGING, 2 * STAGING + 7])
def test_what_is_copied_there_comes_back(device, count):
    block, content = device.take(count), drawn(count)
    device.upload(content, block)
    content[:] = 0  # it may change at once
    assert (device.download(block, count) == drawn(count)).all()


def test_many_small_arrays_are_copied_while_the_stream_runs(device):
    blocks = [device.take(1 << 20) for _ in range(20)]  # more than is staged at once
    for seed, block in enumerate(blocks):
        device.upload(drawn(1 << 20, seed), block)
    for seed, block in enumerate(blocks):
        assert (device.download(block, 1 << 20) == drawn(1 << 20, seed)).all()


def test_memory_is_used_again(device):
    first = device.take(1000)
    address = first.address
    del first
    gc.collect()
    assert device.take(1010).address == address  # of the same size once it is rounded
    held = [device.take(1000) for _ in range(3)]
    assert len({block.address for block in held}) == 3
    wanted = held[0].address
    held.clear()
    assert device.take(1000, wanted=wanted).address == wanted


def test_what_is_kept_for_later_counts_as_free(device):
    before = device.free_memory()
    block = device.take(64 << 20)
    assert device.free_memory() <= before - (64 << 20)
    del block
    assert device.free_memory() >= before
    device.trim()
    assert device.free_memory() >= before


def test_too_much_is_refused_and_the_device_goes_on(device):
    with pytest.raises(DeviceMemoryError, match="free memory"):
        device.take(1 << 50)
    block = device.take(16)
    device.clear(block)
    assert not device.download(block, 16).any()


def test_a_recording_runs_again_where_it_was(device):
    block = device.take(4096)
    device.upload(drawn(4096), block)
    recording = device.record(lambda: device.clear(block))
    assert (device.download(block, 4096) == drawn(4096)).all()  # it was not run
    for seed in range(3):
        device.upload(drawn(4096, seed), block)
        recording.launch()
        assert not device.download(block, 4096).any()
    recording.close()


def test_what_cannot_be_captured_leaves_the_stream_as_it_was(device):
    with pytest.raises(VispruneError, match="CUDA failed at cuStreamSynchronize"):
        device.record(device.synchronize)
    block = device.take(8)
    device.clear(block)
    assert not device.download(block, 8).any()
