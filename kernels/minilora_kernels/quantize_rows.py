"""Inputs of products become groups of integers, or bfloat16, row by row, in every step."""

import numpy as np

from .inputs import FINE_STEP, GROUP_MIN, UNROLLED
from .jit import inlined, kernel
from .simd import i32x16, inverse, magnitude, numbers_of, round_i32, splat_f32, splat_i32, tile, to_f32, vmax_i32
from .simd_lanes import hmax4_i32, hsum4_i32, lane
from .simd_memory import load_f32, store_bf16, store_first, store_first_i32, store_i8, store_i16

LARGEST_INT8, FINE_STEPS, NOTHING = np.float32(127), np.float32(1) / FINE_STEP, np.int32(0)

_four_vectors = tile(i32x16, 4)


def _quantize_groups(count, finely):
    """One group of a row, or four, whose largest numbers and sums are then found together."""
    store, store_i32 = store_first[count], store_first_i32[count]

    @inlined
    def quantize_groups(x, at, group, rows, to, scale_at):
        largest, totals = _four_vectors(), _four_vectors()
        for g in range(4):
            largest[g], totals[g] = splat_i32(NOTHING), splat_i32(NOTHING)
        for i in range(0, group, 16):
            for g in range(count):
                largest[g] = vmax_i32(magnitude(load_f32(x, at + g * group + i)), largest[g])
        most = numbers_of(hmax4_i32(largest[0], largest[1], largest[2], largest[3]))
        # What is added is NaN where a number is not finite, else 0.
        scales = most / splat_f32(LARGEST_INT8) + (most - most)
        inverses = inverse(scales)
        for i in range(0, group, 16):
            for g in range(count):
                place = g * group + i
                steps = load_f32(x, at + place) * lane(inverses, g)
                q = round_i32(steps)
                totals[g] = totals[g] + q
                store_i8(rows.q, to + place, q)
                if finely:
                    store_i16(rows.fine, to + place, round_i32(steps * splat_f32(FINE_STEPS)))
        sums = hsum4_i32(totals[0], totals[1], totals[2], totals[3])
        store(rows.scales, scale_at, scales)
        store_i32(rows.sums, scale_at, splat_i32(NOTHING) - sums)
        store(rows.offsets, scale_at, scales * to_f32(sums))

    return quantize_groups


def _quantizer(finely):
    four, one = _quantize_groups(4, finely), _quantize_groups(1, finely)

    @kernel
    def quantize_row(x, at, n, group, rows, row, column):
        """q = round(x / scale), scale = max |x| / 127 in each group: columns column .. column + n of one row.

        x: float32, n values from at, n a multiple of 16: the last group may be shorter; column: a multiple of group;
        rows: Rows, whose q, scales, sums and offsets are written for row `row`; quantize_row_finely also writes fine =
        round(x / (scale * FINE_STEP)). A group of zeros has scale 0, one with a number that is not finite scale NaN:
        its integers, which may be anything, would hide that.
        """
        to, scale_at, i = row * rows.stride + column, row * (rows.stride // GROUP_MIN) + column // group, 0
        # LLVM unrolls loops over a size it knows.
        while group == UNROLLED and i + 4 * UNROLLED <= n:
            four(x, at + i, UNROLLED, rows, to + i, scale_at)
            i, scale_at = i + 4 * UNROLLED, scale_at + 4
        while i + 4 * group <= n:
            four(x, at + i, group, rows, to + i, scale_at)
            i, scale_at = i + 4 * group, scale_at + 4
        while i < n:
            one(x, at + i, min(group, n - i), rows, to + i, scale_at)
            i, scale_at = i + group, scale_at + 1

    return quantize_row


quantize_row, quantize_row_finely = _quantizer(False), _quantizer(True)


@kernel
def round_row(x, at, n, rows, row, column):
    """rounded = x as bfloat16, to nearest, ties to even: columns column .. column + n of one row.

    x: float32, n values from at, n a multiple of 16; rows: Rows. NaN stays NaN.
    """
    to = row * rows.stride + column
    for i in range(0, n, 16):
        store_bf16(rows.rounded, to + i, load_f32(x, at + i))
