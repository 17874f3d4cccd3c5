"""Prefetching one thing while computing another, a few lines at a time.

A core silently drops prefetches that come in a burst.
"""

from typing import NamedTuple

import numpy as np

from .jit import kernel
from .memory import CACHE_LINE
from .simd_memory import prefetch_beside


class Ask(NamedTuple):
    """What to prefetch: from bytes[at] on, `each` bytes for every 16 elements of the work."""

    bytes: np.ndarray
    at: int
    each: int


@kernel
def nothing(array):
    """To prefetch nothing of this array."""
    return Ask(array, 0, 0)


@kernel
def ask_beside(ask, i):
    """Prefetch the share that goes with elements i .. i + 16 of the work."""
    at = ask.at + i // 16 * ask.each
    for n in range(0, ask.each, CACHE_LINE):
        prefetch_beside(ask.bytes, at + n)
