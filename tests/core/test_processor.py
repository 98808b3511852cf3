"""The processor's name and flags, read from what Linux tells of x86 and ARM processors."""

from __future__ import annotations

import platform

import pytest

from visprune import cores

X86 = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu avx2 avx512f{more}
bugs\t\t: spectre_v1

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp bf16\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """`cpuinfo(text)` has Linux tell this of its processors."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(cores, "_CPUINFO", path)
    return path.write_text


def test_x86(cpuinfo):
    cpuinfo(X86.format(more=""))
    assert cores.processor_name() == "Intel(R) Xeon(R) Platinum 8488C"
    assert cores.processor_flags() == ("fpu", "avx2", "avx512f")
    assert cores.sums_may_overflow()


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni"])
def test_sums_do_not_overflow_with_vnni(flag, cpuinfo):
    cpuinfo(X86.format(more=f" {flag}"))
    assert not cores.sums_may_overflow()


def test_arm_names_no_model(cpuinfo):
    cpuinfo(ARM)
    assert cores.processor_name() == (platform.processor() or platform.machine())
    assert cores.processor_flags() == ("fp", "asimd", "asimddp", "bf16")
    assert not cores.sums_may_overflow()


def test_a_system_that_does_not_tell(cpuinfo):
    assert cores.processor_name() == (platform.processor() or platform.machine())
    assert cores.processor_flags() == ()
    assert not cores.sums_may_overflow()
