"""Conversions of numbers, faster than NumPy's: float16, and panels of int8 with scales."""

from functools import cache

import numpy as np

from .floats import check_largest
from .formats import FLOAT16
from .jit import kernel, program
from .simd import round_i32, splat_f32, splat_i32, vabs, vmax
from .simd_lanes import hmax
from .simd_memory import load_f16, load_f32, scatter_i8, store_f16, store_f32

LARGEST_INT8 = np.float32(127)
ZERO, TINY = np.float32(0), np.float32(1e-30)


@kernel
def narrow(x, n, out, at):
    """out[at + i] = float16(x[i]), i < n, to nearest, ties to even; larger numbers become the largest.

    Returns max |x| of those that are not NaN. x: float32; out: uint16; n a multiple of 16.
    """
    largest = splat_f32(ZERO)
    for i in range(0, n, 16):
        v = load_f32(x, i)
        largest = vmax(vabs(v), largest)
        store_f16(out, at + i, v)
    return hmax(largest)


@kernel
def widen(x, n, out):
    """out[i] = float32(x[i]), i < n, exactly. x: float16 as uint16; out: float32; n a multiple of 16."""
    for i in range(0, n, 16):
        store_f32(out, i, load_f16(x, i))


@kernel
def quantize_panels(x, panels, inner, together, offset, out, at):
    """Panels x of [inner][16] float32: scale[i] = max(|x[k, i]| for all k, 1e-30) / 127, q = round(x / scale).

    out: uint8; each panel from byte `at` on is 16 float32 scales, then q + offset as bytes
    [inner / together][16][together]; inner is a multiple of `together`.
    """
    for p in range(panels):
        start, largest = p * inner * 16, splat_f32(ZERO)
        for k in range(inner):
            largest = vmax(vabs(load_f32(x, start + 16 * k)), largest)
        # Above 0, as rows of zeros are divided by it, too.
        scale = vmax(largest, splat_f32(TINY)) / splat_f32(LARGEST_INT8)
        store_f32(out, at, scale)
        at += 64
        for k in range(inner):
            q = round_i32(load_f32(x, start + 16 * k) / scale)
            j = k % together
            scatter_i8(out, at + 16 * (k - j) + j, together, q + splat_i32(np.int32(offset)))
        at += 16 * inner


@cache
def _programs():
    return program(narrow), program(widen), program(quantize_panels)


def quantize_panels_int8(x: np.ndarray, inner: int, together: int, offset: int, out: np.ndarray, at: int) -> None:
    """See quantize_panels; x: float32, flat, a whole number of panels."""
    _programs()[2](x, len(x) // (16 * inner), inner, together, offset, out, at)


def narrow_float16(x: np.ndarray, out: np.ndarray, at: int) -> None:
    """out[at : at + len(x)] = float16(x). x: float32, out: uint16, one-dimensional; len(x) a multiple of 16.

    Raises OverflowError where a number is too large.
    """
    check_largest(_programs()[0](np.ascontiguousarray(x), len(x), out, at), FLOAT16)


def widen_float16(x: np.ndarray) -> np.ndarray:
    """float32 of float16 numbers held as uint16, of any shape."""
    flat, out = np.ascontiguousarray(x).reshape(-1), np.empty(x.shape, np.float32)
    whole = len(flat) // 16 * 16
    _programs()[1](flat, whole, out.reshape(-1))
    out.reshape(-1)[whole:] = flat[whole:].view(np.float16)
    return out
