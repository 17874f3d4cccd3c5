"""Numba's types of what kernels are given, for the signatures of units."""

from typing import Any

import numpy as np
from numba import from_dtype, types

NUMBER = types.intp


def array(dtype: Any, dimensions: int = 1) -> types.Array:
    """Arrays of this NumPy type, without gaps."""
    return types.Array(from_dtype(np.dtype(dtype)), dimensions, "C")


def named(kind: Any, *arrays: types.Array) -> types.BaseTuple:
    """A NamedTuple of these arrays in order, and numbers where its annotations say int."""
    rest = iter(arrays)
    fields = [NUMBER if annotation is int else next(rest) for annotation in kind.__annotations__.values()]
    return types.BaseTuple.from_types(fields, kind)


BYTES, FLOATS, INTEGERS = array(np.uint8), array(np.float32), array(np.int64)
