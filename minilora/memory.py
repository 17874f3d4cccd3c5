"""What memory is free, huge pages where the system has them, and giving memory back to it.

Steps over 1.1B weights in pages of 4 KiB were measured at 2 to 4% slower than in pages of 2 MiB (bench/LOG.md).
"""

import contextlib
import ctypes
import mmap

import numpy as np
import psutil

from minilora_kernels.limits import memory_left

HUGE_PAGE = 2 << 20
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


def give_back_freed_arrays() -> None:
    """Have this process return arrays of 128 KiB and more to the system when they are freed; for servers.

    glibc otherwise keeps blocks of up to 32 MiB, once one of that size was freed, in a heap for each thread: hundreds
    of megabytes where adapters come and go. Does nothing where the C library has no such setting.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 128 << 10)
