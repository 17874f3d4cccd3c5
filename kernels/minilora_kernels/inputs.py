"""The inputs of products: rows of numbers, in every form that a kernel reads."""

from typing import NamedTuple

import numpy as np

from .kinds import FLOATS, array, named

# The smallest group, and the most usual one, for which loops are unrolled.
GROUP_MIN, UNROLLED = 16, 32
# The step of `fine`, relative to that of q.
FINE_STEP = np.float32(1 / 256)


class Rows(NamedTuple):
    """The inputs of a product, row r from r * stride on (scales and sums: r * stride / GROUP_MIN).

    values: float32, read by floating-point formats; rounded: int16, the bits of their bfloat16, read by formats that
    round inputs. Quantised in groups of the matrix's size: q: int8; scales: float32, value = scale * q; sums: int32,
    minus the sum of each group's q, and offsets: float32, scale * sum of q. fine: int16, value = scale * FINE_STEP *
    fine, read by int8 adapters.
    """

    values: np.ndarray
    rounded: np.ndarray
    q: np.ndarray
    fine: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    offsets: np.ndarray
    stride: int


INPUTS = named(Rows, FLOATS, array(np.int16), array(np.int8), array(np.int16), FLOATS, array(np.int32), FLOATS)
