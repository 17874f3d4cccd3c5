"""Memory that is asked for beside work on something else, a little at a time: a core drops what it is asked for at once."""

from typing import NamedTuple

import numpy as np

from .jit import kernel
from .memory import CACHE_LINE
from .simd_memory import prefetch_beside


class Ask(NamedTuple):
    """What to ask for: bytes[at] and what follows, `each` bytes beside work on each 16 numbers."""

    bytes: np.ndarray
    at: int
    each: int


@kernel
def nothing(array):
    """Nothing of this array."""
    return Ask(array, 0, 0)


@kernel
def ask_beside(ask, i):
    """While numbers i .. i + 16 of the work are at hand."""
    at = ask.at + i // 16 * ask.each
    for n in range(0, ask.each, CACHE_LINE):
        prefetch_beside(ask.bytes, at + n)
