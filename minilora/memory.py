"""Memory for what every step reads from end to end: on cache lines, and in huge pages where the system has them.

Steps over 1.1B weights in pages of 4 KiB were measured at 2 to 4% slower than in pages of 2 MiB (bench/LOG.md).
"""

import contextlib
import mmap

import numpy as np

HUGE_PAGE = 2 << 20
ALIGNMENT = 64


def aligned_empty(size: int) -> np.ndarray:
    """uint8 memory that begins on a cache line. NumPy asks for huge pages by itself."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def huge_pages(memory: mmap.mmap) -> np.ndarray:
    """The same memory as uint8, in huge pages where it is not filled yet and the system has them."""
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
