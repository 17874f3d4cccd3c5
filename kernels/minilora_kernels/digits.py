"""Numbers as integers of 14 bits and a sign, for the byte dot product: v = round(x / scale) = 128 * high + low.

Each of the two digits is a byte, each product of bytes is exact, and what rounding adds is small beside what int8
keys, values or weights cost. Sixteen numbers become eight words of four bytes: their high digits, then their low ones.
Behind the digits of all numbers that share it lies the scale.
"""

import numpy as np

from .jit import kernel
from .simd import (
    high_digit,
    hmax_i32,
    hsum_i32,
    load_f32,
    low_digit,
    magnitude,
    number_of,
    round_i32,
    splat_f32,
    splat_i32,
    store_i8,
    store_sums,
    vmax_i32,
)

# The largest integer whose high digit is 127.
LARGEST = np.float32(127 * 128)
ZERO, ONE, NOTHING = np.float32(0), np.float32(1), np.int32(0)
INFINITY, TINY = np.float32(np.inf), np.finfo(np.float32).tiny
# Where the low digits of 16 numbers lie, and what store_sixteen puts behind them.
LOW, SCALE, MINUS = 4, 8, 9


@kernel
def largest(x, at, n):
    """max |x[i]|, i < n, a multiple of 16; NaN where one of them is NaN."""
    bits = splat_i32(np.int32(0))
    for i in range(0, n, 16):
        bits = vmax_i32(magnitude(load_f32(x, at + i)), bits)
    return number_of(hmax_i32(bits))


@kernel
def inverse_of(scale):
    """1 / scale; 0 where that is not finite, and for a scale that is not, which says enough by itself."""
    return ONE / scale if TINY <= scale < INFINITY else ZERO


@kernel
def _store_both(x, at, high, low):
    store_i8(x, at, high)
    store_i8(x, at + LOW, low)


def make_digits(sums: bool):
    """A kernel that turns numbers into digits, with their sums behind them or not."""

    @kernel
    def to_digits(scratch, at, first, end, behind):
        """Numbers first .. end (multiples of 16) of the row at `at` as digits, in place; scale and sums from `behind` on.

        Where one of them is not finite the scale is not either: integers would hide it.
        """
        scale = largest(scratch, at + first, end - first) / LARGEST
        inverse = splat_f32(inverse_of(scale))
        minus_high, minus_low = splat_i32(NOTHING), splat_i32(NOTHING)
        for i in range(first, end, 16):
            v = round_i32(load_f32(scratch, at + i) * inverse)
            high, low = high_digit(v), low_digit(v)
            _store_both(scratch, at + i // 2, high, low)
            if sums:
                minus_high, minus_low = minus_high - high, minus_low - low
        scratch[at + behind] = scale
        if sums:
            scratch[at + behind + 1] = number_of(hsum_i32(minus_high))
            scratch[at + behind + 2] = number_of(hsum_i32(minus_low))

    return to_digits


@kernel
def store_sixteen(x, at, numbers):
    """16 numbers as digits at x[at]: 4 words of high ones, 4 of low ones, the scale, and for each word minus the sum of its
    integers. Where one of them is not finite the scale is not either.
    """
    scale = number_of(hmax_i32(magnitude(numbers))) / LARGEST
    v = round_i32(numbers * splat_f32(inverse_of(scale)))
    _store_both(x, at, high_digit(v), low_digit(v))
    x[at + SCALE] = scale
    store_sums(x, at + MINUS, splat_i32(NOTHING) - v)
