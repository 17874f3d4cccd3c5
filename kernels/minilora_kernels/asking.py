"""Memory that is asked for beside work on something else, a little at a time: a core drops what it is asked for at once."""

from typing import NamedTuple

import numpy as np

from .jit import kernel
from .memory import CACHE_LINE
from .simd_memory import prefetch_beside


class Ask(NamedTuple):
    """What to ask for beside work on 16 numbers at a time: `each` numbers for each of these, from numbers[at] on."""

    numbers: np.ndarray
    at: int
    each: int


@kernel
def nothing(numbers):
    """Nothing of these."""
    return Ask(numbers, 0, 0)


@kernel
def ask_beside(ask, i):
    """While numbers i .. i + 16 of the work are at hand."""
    at = ask.at + i // 16 * ask.each
    for n in range(0, ask.each, CACHE_LINE // ask.numbers.itemsize):
        prefetch_beside(ask.numbers, at + n)


@kernel
def ask_at_once(ask, count):
    """For work on `count` numbers."""
    for i in range(0, count, 16):
        ask_beside(ask, i)
