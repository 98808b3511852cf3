"""Machines that are not here: their files, and what their tools print, in the published form."""

from __future__ import annotations

import json
from pathlib import Path

from visprune.machine import System

_MEMORY = "MemTotal:       {kb} kB\nMemFree:         1024 kB\n"
_QUERY = "nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader,nounits"
_JETPACK = "dpkg-query --show --showformat=${db:Status-Status} ${Version} "

# Name -> (files, what commands print)
MACHINES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "plain": ({"proc/meminfo": _MEMORY.format(kb=16384000)}, {}),
    "rtx4090": (
        {
            "proc/meminfo": _MEMORY.format(kb=65536000),
            "usr/local/cuda/version.json": json.dumps({"cuda": {"name": "CUDA SDK", "version": "12.4.1"}}),
        },
        {
            _QUERY: "NVIDIA GeForce RTX 4090, 8.9, 24564, 570.86.15\nNVIDIA T4, 7.5, 15360, 570.86.15\n",
            "nvidia-smi": "| NVIDIA-SMI 570.86.15 Driver Version: 570.86.15 CUDA Version: 12.8     |\n",
        },
    ),
    "orin-nano-jetpack6": (
        {
            "proc/meminfo": _MEMORY.format(kb=7802056),
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0 "
            " Release Build  (buildbrain@mobile-u64-6336-d8000)\nGCC version:  (Buildroot 2022.08) 11.3.0\n",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, "
            "EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n",
            "usr/local/cuda/version.json": '{\n "cuda" : {\n  "version" : "12.6.11"\n }\n}',
        },
        {
            _QUERY: "Orin (nvgpu), [N/A], [N/A], 540.4.0\n",
            "nvidia-smi": "| NVIDIA-SMI 540.4.0 Driver Version: 540.4.0 CUDA Version: N/A      |\n",
            "nvpmodel -q": "NV Power Mode: MAXN_SUPER\n2\n",
            f"{_JETPACK}nvidia-jetpack": "installed 6.2+b77",
            f"{_JETPACK}python3-libnvinfer": "installed 10.3.0.30-1+cuda12.5",
        },
    ),
    "thor-jetpack7": (
        {
            "proc/meminfo": _MEMORY.format(kb=128783460),
            "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,tegra264\0",
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, "
            "EABI: aarch64, DATE: Fri Aug 22 00:55:42 UTC 2025\n",
        },
        {
            _QUERY: "NVIDIA Thor, 11.0, [N/A], 580.00\n",
            "nvidia-smi": "| NVIDIA-SMI 580.00 Driver Version: 580.00 CUDA Version: 13.0     |\n",
            "nvpmodel -q": "NV Power Mode: 120W\n1\n",
            f"{_JETPACK}nvidia-jetpack": "not-installed ",
        },
    ),
}


def machine(name: str, root: Path) -> System:
    """One of them, its files written below `root`."""
    files, commands = MACHINES[name]
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return System(root, lambda command: commands.get(" ".join(command)), lambda: None)
