"""Cores and memory that a process may use, read from files in the form that Linux gives them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from visprune import cores


@pytest.fixture
def eight_threads(tmp_path, monkeypatch):
    """A processor of four cores with two hardware threads each, all of which the process may use."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return tmp_path


def test_two_threads_of_a_core_count_once(eight_threads):
    assert cores.usable_cores() == 4


def test_the_affinity_mask_limits_cores(eight_threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert cores.usable_cores() == 2


def test_without_a_topology_each_thread_is_a_core(eight_threads, monkeypatch):
    monkeypatch.setattr(cores, "_CPUS", eight_threads / "none")
    assert cores.usable_cores() == 8


@pytest.mark.parametrize(
    ("quota", "found"),
    [
        ("max 100000", 4),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("900000 100000", 4),
        ("", 4),
    ],
)
def test_the_quota_of_a_container_limits_cores(quota, found, eight_threads):
    (eight_threads / "cpu.max").write_text(quota)
    assert cores.usable_cores() == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("MemTotal:  16384000 kB\nMemAvailable:    8000 kB\n", 8_192_000),
        ("MemTotal:  16384000 kB\n", None),
        ("MemAvailable: some kB\n", None),
    ],
)
def test_available_memory(text, found, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(cores, "_MEMINFO", tmp_path / "meminfo")
    assert cores.available_memory() == found


def test_limits_of_a_service_are_counted(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemAvailable: 9000 kB\n")
    (tmp_path / "self").write_text("1:name=systemd:/x\n0::/system.slice/visprune.service\n")
    slice_, service = tmp_path / "system.slice", tmp_path / "system.slice/visprune.service"
    service.mkdir(parents=True)
    for group, most in ((slice_, "max"), (service, "4000000")):
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text("1500000\n")
        (group / "memory.stat").write_text("anon 900000\ninactive_file 300000\n")
    monkeypatch.setattr(cores, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path / "self")
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path)
    assert cores.available_memory() == 4_000_000 - 1_500_000 + 300_000
    (service / "memory.current").write_text("5000000\n")
    assert cores.available_memory() == 0
    (slice_ / "memory.max").unlink()
    (service / "memory.max").write_text("max\n")
    assert cores.available_memory() == 9000 * 1024


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor : 0\nflags\t\t: fpu avx2\n", True),
        ("processor : 0\nflags\t\t: fpu avx512_vnni\n", False),
        ("processor : 0\nFeatures\t: asimddp\n", False),  # not x86
    ],
)
def test_sums_of_bytes_may_overflow_without_vnni(text, found, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cores, "_CPUINFO", tmp_path / "cpuinfo")
    assert cores.sums_may_overflow() is found


def test_a_system_that_says_nothing(tmp_path, monkeypatch):
    for name in ("_MEMINFO", "_CPUINFO"):
        monkeypatch.setattr(cores, name, tmp_path / "none")
    assert cores.available_memory() is None
    assert cores.sums_may_overflow() is False


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells its memory there")
def test_this_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 <= cores.usable_cores() <= (os.cpu_count() or 1)
    assert 0 < (cores.available_memory() or 0) <= total
