"""Wide integers: numbers as 14 bits and a sign, v = round(x / scale), to be multiplied by bytes.

Sums are exact for up to 1040 products: 127 * 16256 * 1040 < 2^31. Heads have at most 1024 numbers, splits 256
positions, groups of ranks 16. The rounding error is small beside that of int8 keys, values or weights. Four numbers
become two words, each of which is multiplied by the same four bytes:

    digits    v = 128 * high + low: four high digits, then four low ones; each word's products have a sum of their own
    pairs     numbers 0 and 2 as 16 bits each, then numbers 1 and 3; one sum for all. Where dot.PAIRS is true

Among sixteen numbers the four first words precede the four second ones. The scale follows all numbers that share it.
"""

import numpy as np

from .dot import PAIRS
from .jit import kernel
from .prefetching import prefetch_share
from .simd import (
    i32x16,
    inverse,
    join_digits,
    magnitude,
    number_of,
    primitive,
    round_i32,
    splat_f32,
    splat_i32,
    vmax_i32,
)
from .simd_lanes import hmax_i32, hsum_i32
from .simd_memory import load_f32, store_even_i16, store_high_digits, store_low_digits, store_odd_i16, store_sums

# Keeps the high digit v >> 7 within -127 .. 127: dot4_bytes takes no -128.
LARGEST = np.float32(127 * 128)
NOTHING = np.int32(0)
# Offsets among 16 stored numbers: the second words, then the scale and the four negated sums that store_sixteen adds.
SECOND, SCALE, MINUS = 4, 8, 9
# Which sum the second words' products go to: the same one for pairs, their own for digits.
SECOND_SUM = 0 if PAIRS else 1

_store_first, _store_second = (store_even_i16, store_odd_i16) if PAIRS else (store_high_digits, store_low_digits)

join_sums = primitive(i32x16, [i32x16] * 2, lambda b, first, second: first) if PAIRS else join_digits
"""The sum of all products, from those of the first and of the second words."""


@kernel
def largest(x, at, n):
    """max |x[at + i]| over i < n, a multiple of 16; NaN if one of them is NaN."""
    bits = splat_i32(np.int32(0))
    for i in range(0, n, 16):
        bits = vmax_i32(magnitude(load_f32(x, at + i)), bits)
    return number_of(hmax_i32(bits))


@kernel
def _store_words(x, at, v):
    _store_first(x, at, v)
    _store_second(x, at + SECOND, v)


def make_to_wide(minus: bool):
    """A kernel that turns numbers into wide integers; minus: it stores their negated sum, too."""

    @kernel
    def to_wide(scratch, at, first, end, behind, most, prefetch):
        """Numbers first .. end (multiples of 16) of the row at `at` become words, in place.

        The scale goes to at + behind; if `minus`, the negated sum of the integers follows it. most: the largest |x|,
        see `largest`; where it is not finite neither is the scale, as integers would hide that. prefetch: what to
        prefetch meanwhile.
        """
        scale = most / LARGEST
        factor, total = inverse(splat_f32(scale)), splat_i32(NOTHING)
        for i in range(first, end, 16):
            v = round_i32(load_f32(scratch, at + i) * factor)
            _store_words(scratch, at + i // 2, v)
            prefetch_share(prefetch, i - first)
            if minus:
                total = total - v
        scratch[at + behind] = scale
        if minus:
            scratch[at + behind + 1] = number_of(hsum_i32(total))

    return to_wide


@kernel
def store_sixteen(x, at, numbers):
    """16 numbers as words at x[at]: 4 first ones, 4 second ones, the scale, and the negated sum of each four integers.

    If a number is not finite, neither is the scale.
    """
    scale = number_of(hmax_i32(magnitude(numbers))) / LARGEST
    v = round_i32(numbers * inverse(splat_f32(scale)))
    _store_words(x, at, v)
    x[at + SCALE] = scale
    store_sums(x, at + MINUS, splat_i32(NOTHING) - v)
