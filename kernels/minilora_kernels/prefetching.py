"""Prefetching one thing while computing another, a few lines at a time.

A core silently drops prefetches that come in a burst.
"""

from typing import NamedTuple

import numpy as np

from .jit import kernel
from .memory import CACHE_LINE
from .simd_memory import prefetch_soon


class Prefetch(NamedTuple):
    """What to prefetch: from bytes[at] on, `each` bytes for every 16 elements of the work."""

    bytes: np.ndarray
    at: int
    each: int


@kernel
def no_prefetch(array):
    """A Prefetch of nothing: of this array, for the type's sake."""
    return Prefetch(array, 0, 0)


@kernel
def prefetch_share(plan, i):
    """Prefetch the share that goes with elements i .. i + 16 of the work."""
    at = plan.at + i // 16 * plan.each
    for n in range(0, plan.each, CACHE_LINE):
        prefetch_soon(plan.bytes, at + n)
