"""Attention's tiles for float32 and float16 pages: scores and sums of values for a few rows at a time."""

import numpy as np

from . import cpu
from .attention_span import key_at, keys_beside, value_at
from .jit import inlined, kernel
from .pages import KV_FLOAT16, KV_FLOAT32, SPLIT, SUBPAGE, advance, cursor_at
from .simd import f32x16, fma, splat_f32, tile
from .simd_memory import compiler_barrier, load_f16, load_f32, load_scalar_f32, prefetch_soon, store_f32

_LOAD = {KV_FLOAT32: load_f32, KV_FLOAT16: load_f16}
# Numbers in a cache line.
_LINE = {KV_FLOAT32: 16, KV_FLOAT16: 32}

# MOST_ROWS: rows of the largest score tile and of the largest int8 value tile. AT_ONCE: vectors per row, so that all
# sums stay in registers: a score tile has AT_ONCE vectors of 16 positions, a float value tile 2 * AT_ONCE of 16
# columns, an int8 value tile AT_ONCE, as it keeps two sums for each number.
MOST_ROWS, AT_ONCE = (4, 2) if cpu.vectors() >= 32 else (3, 1)
# Rows of the largest tile of float values: 3 would need 17 of 16 registers.
VALUE_ROWS = 4 if cpu.vectors() >= 32 else 2

ZERO = np.float32(0)


def score_tile(kv_format: int):
    """scores[r, t] = q[r] . key[t] for 1 to MOST_ROWS rows and the 32 tokens of a subpage.

    part: (token, values, keys): the subpage's first token, and where in kv.numbers the values and keys lie, a subpage
    of each, which the tile prefetches if `prefetches`; -1 where there are none.
    """
    dots = _dots(kv_format)

    @inlined
    def score(rows, kv, part, prefetches, scratch, q_at, scores_at):
        token, values, keys = part
        if not prefetches:
            values, keys = -1, -1
        dots(rows, kv, kv.numbers, token * kv.size, values, keys, scratch, q_at, scores_at)

    return score


def many_scores(kv_format: int):
    """Likewise for any number of rows; float16 keys are widened once for all of them.

    Rows are read and scored up to a multiple of MOST_ROWS, whatever they hold.
    """
    dots, load, line = _dots(KV_FLOAT32), _LOAD[kv_format], _LINE[kv_format]

    @kernel
    def scores(kv, token, values, keys, rows, scratch, q_at, keys_at, scores_at):
        for row in range(0, kv.size * SUBPAGE, SUBPAGE):
            for n in range(0, SUBPAGE, line):
                prefetch_soon(kv.numbers, values + row + n)
                if keys >= 0:
                    prefetch_soon(kv.numbers, keys + row + n)
            for n in range(0, SUBPAGE, 16):
                store_f32(scratch, keys_at + row + n, load(kv.numbers, token * kv.size + row + n))
            compiler_barrier()
        for r in range(0, rows, MOST_ROWS):
            dots(MOST_ROWS, kv, scratch, keys_at, -1, -1, scratch, q_at + r * kv.size, scores_at + r * SPLIT)

    return scores


def _dots(kv_format: int):
    """The scores of 1 to MOST_ROWS rows and a subpage whose keys lie at numbers[at], in numbers of this format."""
    load, line = _LOAD[kv_format], _LINE[kv_format]
    # Two sums for each 16 positions, of even and of odd d, so that no FMA waits for another.
    new_acc, new_key = tile(f32x16, MOST_ROWS, 2 * AT_ONCE), tile(f32x16, AT_ONCE)

    @inlined
    def some(rows, kv, numbers, at, values, keys, scratch, q_at, scores_at):
        acc, key = new_acc(), new_key()
        for r in range(rows):
            for n in range(2 * AT_ONCE):
                acc[r, n] = splat_f32(ZERO)
        for d in range(0, kv.size, 2):
            for c in range(2):
                row = (d + c) * SUBPAGE
                for n in range(0, SUBPAGE, line):
                    if values >= 0:
                        prefetch_soon(kv.numbers, values + row + n)
                    if keys >= 0:
                        prefetch_soon(kv.numbers, keys + row + n)
                for n in range(AT_ONCE):
                    key[n] = load(numbers, at + row + 16 * n)
                for r in range(rows):
                    q = splat_f32(load_scalar_f32(scratch, q_at + r * kv.size + d + c))
                    for n in range(AT_ONCE):
                        acc[r, 2 * n + c] = fma(key[n], q, acc[r, 2 * n + c])
                if values >= 0:
                    compiler_barrier()
        for r in range(rows):
            for n in range(AT_ONCE):
                store_f32(scratch, scores_at + r * SPLIT + 16 * n, acc[r, 2 * n] + acc[r, 2 * n + 1])

    @inlined
    def dots(rows, kv, numbers, at, values, keys, scratch, q_at, scores_at):
        some(rows, kv, numbers, at, values, keys, scratch, q_at, scores_at)
        if AT_ONCE == 1:
            some(rows, kv, numbers, at + 16, -1, -1, scratch, q_at, scores_at + 16)

    return dots


def value_tile(width: int, kv_format: int):
    """sums[r] = sum over t of weight[r, t] * value[t] for 1 to VALUE_ROWS rows, 16 * width columns from d on.

    part: (span, d). With `prefetches` keys come nearer meanwhile, see attention_span.
    """
    load, line = _LOAD[kv_format], _LINE[kv_format]
    new_acc, new_value = tile(f32x16, VALUE_ROWS, width), tile(f32x16, width)

    @inlined
    def accumulate(rows, kv, part, prefetches, scratch, weights_at, sums_at):
        span, d = part
        acc, value = new_acc(), new_value()
        for r in range(rows):
            for j in range(width):
                acc[r, j] = splat_f32(ZERO)
        cursor, ahead = cursor_at(kv, span.first), keys_beside(kv, span, 0, d)
        for p in range(span.first, span.end, SUBPAGE):
            at, weights = value_at(kv, span, cursor) * kv.size + d, weights_at + p % SPLIT
            keys = key_at(kv, span, ahead) if prefetches else -1
            asked = keys * kv.size + ahead.column * SUBPAGE
            for t in range(min(SUBPAGE, span.end - p)):
                for j in range(width):
                    if keys >= 0 and (t * width + j) * 16 % line == 0:
                        prefetch_soon(kv.numbers, asked + (t * width + j) * 16)
                    value[j] = load(kv.numbers, at + t * kv.size + 16 * j)
                for r in range(rows):
                    weight = splat_f32(load_scalar_f32(scratch, weights + r * SPLIT + t))
                    for j in range(width):
                        acc[r, j] = fma(value[j], weight, acc[r, j])
                if prefetches:
                    compiler_barrier()
            cursor, ahead = advance(kv, cursor, kv.size), advance(kv, ahead, 16 * width)
        for r in range(rows):
            for j in range(width):
                store_f32(scratch, sums_at + r * kv.size + d + 16 * j, acc[r, j])

    return accumulate
