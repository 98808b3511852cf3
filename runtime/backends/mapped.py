"""Pages of mapped weights that are in memory though nobody may read them again.

ONNX Runtime maps the weights of a graph, and copies most of them into the layout of its kernels. Some that it
has copied stay mapped and in memory too, such as the scales that are part of the copy of their matrix. The
pages of a mapping can go: if they are used after all, they are read from the file again. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

__all__ = ["drop_pages"]

_MAPS = Path("/proc/self/maps")
_PAGES = Path("/proc/self/pagemap")  # 64 bits for each page
_IN_MEMORY, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_DONT_NEED = 4  # MADV_DONTNEED of Linux


def drop_pages(file: Path) -> None:
    """Drop the pages of a file from this process's memory, except mappings that were written to.

    What was written to a private mapping is in no file, and would be lost. Nobody may write meanwhile.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with suppress(OSError), _PAGES.open("rb", buffering=0) as pages:  # where it cannot be read, pages stay
        for start, size in _mappings(str(file.resolve())):
            if not _written(pages.fileno(), start, size):
                madvise(start, size, _DONT_NEED)


def _mappings(name: str) -> Iterator[tuple[int, int]]:
    """Yield the address and the size of each mapping of a file."""
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[5] == name:
            start, end = (int(number, 16) for number in fields[0].split("-"))
            yield start, end - start


def _written(pages: int, start: int, size: int) -> bool:
    """Return whether a mapping has pages of its own, in memory or swapped out."""
    unit = os.sysconf("SC_PAGE_SIZE")
    states = np.frombuffer(os.pread(pages, size // unit * 8, start // unit * 8), np.uint64)
    own = (states & _IN_MEMORY != 0) & (states & _OF_FILE == 0)
    return bool((own | (states & _SWAPPED != 0)).any())
