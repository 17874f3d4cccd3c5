"""Between float16 in memory and float32: NumPy's own conversions are several times slower."""

from functools import cache

import numpy as np

from .jit import kernel, program
from .simd import hmax, load_f16, load_f32, splat_f32, store_f16, store_f32, vabs, vmax

LARGEST_FLOAT16 = 65504.0


@kernel
def narrow(x, n, out, at):
    """out[at + i] = float16(x[i]), i < n, to nearest, ties to even; larger numbers become the largest. Returns max |x|.

    x: float32; out: uint16; n a multiple of 16.
    """
    largest = splat_f32(np.float32(0))
    for i in range(0, n, 16):
        v = load_f32(x, i)
        largest = vmax(largest, vabs(v))
        store_f16(out, at + i, v)
    return hmax(largest)


@kernel
def widen(x, n, out):
    """out[i] = float32(x[i]), i < n, exactly. x: float16 as uint16; out: float32; n a multiple of 16."""
    for i in range(0, n, 16):
        store_f32(out, i, load_f16(x, i))


@cache
def _programs():
    return program(narrow), program(widen)


def narrow_float16(x: np.ndarray, out: np.ndarray, at: int) -> None:
    """out[at : at + len(x)] = float16(x). x: float32, out: uint16, one-dimensional; len(x) a multiple of 16.

    Raises OverflowError where a number is too large.
    """
    largest = _programs()[0](np.ascontiguousarray(x), len(x), out, at)
    if largest > LARGEST_FLOAT16:
        raise OverflowError(f"numbers up to {largest:g}, float16 ends at {LARGEST_FLOAT16:g}")


def widen_float16(x: np.ndarray) -> np.ndarray:
    """float32 of float16 numbers held as uint16, of any shape."""
    flat, out = np.ascontiguousarray(x).reshape(-1), np.empty(x.shape, np.float32)
    whole = len(flat) // 16 * 16
    _programs()[1](flat, whole, out.reshape(-1))
    out.reshape(-1)[whole:] = flat[whole:].view(np.float16)
    return out
