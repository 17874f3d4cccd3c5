"""What memory is free, huge pages where the system has them, and giving memory back to it.

Steps over weights in scattered pages of 4 KiB were measured at up to 1.4 times the time (bench/LOG.md).
"""

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import psutil

from minilora_kernels.limits import memory_left

HUGE_PAGE = 2 << 20
# With this part of a file in huge pages, the rest is not worth reading it again.
ENOUGH = 0.75
# glibc's mallopt(3).
_MMAP_THRESHOLD = -3


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group."""
    free, left = psutil.virtual_memory().available, memory_left()
    return free if left is None else min(free, left)


def huge_pages(memory: mmap.mmap) -> np.ndarray:
    """The same memory as uint8, in huge pages where it is not filled yet and the system has them."""
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def map_file(path: Path) -> np.ndarray:
    """A file that is not empty as uint8, shared with other processes until written to; in huge pages if possible.

    Linux keeps a file in pages as large as there was room for when it was written or read, if its file system has
    large ones at all. Where most are small, the file is read again, unless its beginning shows that this is no use.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        array = huge_pages(mapped)
        _touch(array)
        if len(array) >= HUGE_PAGE and _huge_bytes(array) < ENOUGH * len(array):
            _read_again(file.fileno(), mapped, array[:HUGE_PAGE])
            if _huge_bytes(array):
                _read_again(file.fileno(), mapped, array)
    return array


def _touch(array: np.ndarray) -> None:
    """Have the system bring all pages."""
    array[:: mmap.PAGESIZE].max()


def _huge_bytes(array: np.ndarray) -> int:
    """How much of a mapped file lies in huge pages; 0 where the system does not tell."""
    address, inside = array.ctypes.data, False
    with contextlib.suppress(OSError), open("/proc/self/smaps") as maps:
        for line in maps:
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                first, end = (int(number, 16) for number in name.split("-"))
                inside = first <= address < end
            elif inside and name == "FilePmdMapped:":
                return int(rest.split()[0]) * 1024
    return 0


def _read_again(file: int, mapped: mmap.mmap, start: np.ndarray) -> None:
    """Drop the start of a file from memory, but for what other processes have mapped, and read it anew."""
    with contextlib.suppress(AttributeError, OSError):
        mapped.madvise(mmap.MADV_DONTNEED, 0, len(start))
        os.fsync(file)
        os.posix_fadvise(file, 0, len(start), os.POSIX_FADV_DONTNEED)
    _touch(start)


def give_back_freed_arrays() -> None:
    """Have this process return arrays of 128 KiB and more to the system when they are freed; for servers.

    glibc otherwise keeps blocks of up to 32 MiB, once one of that size was freed, in a heap for each thread: hundreds
    of megabytes where adapters come and go. Does nothing where the C library has no such setting.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 128 << 10)
