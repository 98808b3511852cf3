"""Facts about machines are read from outputs of tools in their published form; nothing raises an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from machines import MACHINES, machine

from visprune import machine as asked
from visprune.machine import Gpu, Jetson, System


@pytest.mark.parametrize(
    ("name", "gpu", "jetson", "cuda", "mode"),
    [
        ("plain", None, None, None, None),
        ("rtx4090", Gpu("NVIDIA GeForce RTX 4090", 89, 24564 << 20, "570.86.15"), None, "12.8", None),
        (
            "orin-nano-jetpack6",  # nvidia-smi does not know its SM there
            Gpu("Orin", 87, 7802056 * 1024, "540.4.0", answers=False),
            Jetson("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "36.4.3", "6.2+b77"),
            "12.6.11",
            "MAXN_SUPER",
        ),
        (
            "thor-jetpack7",
            Gpu("NVIDIA Thor", 110, 128783460 * 1024, "580.00"),
            Jetson("NVIDIA Jetson AGX Thor Developer Kit", "38.2.0", "7"),
            "13.0",
            "120W",
        ),
    ],
)
def test_known_machines(name, gpu, jetson, cuda, mode, tmp_path):
    system = machine(name, tmp_path)
    assert asked.gpu(system) == gpu
    assert asked.jetson(system) == jetson
    assert asked.cuda(system) == cuda
    assert asked.power_mode(system) == mode


def test_the_driver_is_believed_first(tmp_path):
    system = machine("rtx4090", tmp_path)
    told = Gpu("told by the driver", 120, 1 << 30)
    assert asked.gpu(System(system.root, system.run, lambda: told)) == told


def test_a_container_on_a_jetson_has_no_release_file(tmp_path):
    system = machine("orin-nano-jetpack6", tmp_path)
    (tmp_path / "etc/nv_tegra_release").unlink()
    found = asked.jetson(System(tmp_path, lambda command: None, lambda: None))
    assert found is not None
    assert (found.l4t, found.jetpack) == (None, None)
    assert asked.gpu(system).sm == 87


@pytest.mark.parametrize(
    "output", ["", "\n", "no devices were found\n", "a, b, c, d\n", "x, 8.9, 1\n", "\0,,,"]
)
@pytest.mark.parametrize("name", MACHINES)
def test_odd_outputs_are_no_gpu_or_the_chips(name, output, tmp_path):
    system = machine(name, tmp_path)
    odd = System(tmp_path, lambda command: output, system.driver)
    found = asked.gpu(odd)
    assert (found and found.sm) == {"orin-nano-jetpack6": 87, "thor-jetpack7": 110}.get(name)
    assert asked.cuda(odd) == {"rtx4090": "12.4.1", "orin-nano-jetpack6": "12.6.11"}.get(name)
    assert (asked.power_mode(odd), asked.package("bash", odd)) == (None, None)


class TestHere:
    def test_nothing_raises(self):
        found = (
            asked.gpu(),
            asked.jetson(),
            asked.cuda(),
            asked.power_mode(),
            asked.package("no-such-package"),
        )
        assert found[-1] is None

    @pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells its memory there")
    def test_memory_is_the_systems(self):
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert asked.memory() == pytest.approx(physical, rel=0.02)

    def test_a_command_that_fails_says_nothing(self):
        run = asked.HERE.run
        assert run(("false",)) is run(("no-such-command",)) is None
        assert run(("echo", "said")) == "said\n"
