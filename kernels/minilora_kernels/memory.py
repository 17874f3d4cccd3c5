"""Arrays that begin on a cache line: a vector of 64 bytes then never straddles two."""

import numpy as np

CACHE_LINE = 64


def aligned_zeros(count: int, dtype=np.uint8) -> np.ndarray:
    """`count` zeros; NumPy's own arrays begin anywhere.

    Memory that is never written is never taken from the system, and NumPy asks for huge pages for large arrays.
    """
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size].view(dtype)
