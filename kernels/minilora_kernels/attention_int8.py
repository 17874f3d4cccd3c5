"""Attention's tiles for int8 pages: scores and sums as products of bytes with wide integers.

These are queries and the weights of values, see `wide`; those of queries have minus their sum behind their scale.
"""

import numpy as np

from .attention_float import AT_ONCE, MOST_ROWS
from .dot import start_wide, wide_first_signed, wide_first_unsigned, wide_second_signed, wide_second_unsigned
from .jit import inlined, kernel
from .pages import SPLIT, SUBPAGE, token_at, values_behind
from .simd import i32x16, keep_lanes, repeat4, splat_f32, splat_i32, tile, to_f32, u8x64
from .simd_memory import load_f32, load_i32, load_scalar_f32, load_u8, load_word, prefetch_beside, store_f32, store_i32
from .wide import SECOND, SECOND_SUM, join_sums, make_to_wide

ZERO, NOTHING = np.float32(0), np.int32(0)

_score_sums, _score_keys = tile(i32x16, 2 * MOST_ROWS, AT_ONCE), tile(u8x64, AT_ONCE)

_widen_query, _widen_weights = make_to_wide(minus=True), make_to_wide(minus=False)


@kernel
def widen_queries(kv, rows, scratch, at):
    """Rows of queries as score tiles read them."""
    for r in range(rows):
        _widen_query(scratch, at + r * kv.size, 0, kv.size, kv.size // 2)


@kernel
def widen_weights(kv, query, pages, first, end, rows, scratch, at):
    """The weights of positions first .. end of a split, times the values' scales, as value tiles read them."""
    start = first // SPLIT * SPLIT
    stop = start + (end - start + 15) // 16 * 16
    for subpage in range(first, stop, SUBPAGE):
        token = token_at(kv, query, pages, subpage) + values_behind(kv)
        for p in range(subpage, min(subpage + SUBPAGE, stop), 16):
            # Beyond the end lie scales of other texts.
            scales = keep_lanes(load_f32(kv.scales, token + p - subpage), 0, end - p, ZERO)
            for r in range(rows):
                to = at + r * SPLIT + p - start
                store_f32(scratch, to, load_f32(scratch, to) * scales)
    for r in range(rows):
        _widen_weights(scratch, at + r * SPLIT, first - start, stop - start, SPLIT // 2)


@kernel
def sums_to_floats(kv, rows, scratch, weights, sums):
    """A split's sums as float32, in place."""
    for r in range(rows):
        scale = splat_f32(load_scalar_f32(scratch, weights + r * SPLIT + SPLIT // 2))
        for i in range(sums + r * kv.size, sums + (r + 1) * kv.size, 16):
            store_f32(scratch, i, to_f32(load_i32(scratch, i)) * scale)


@inlined
def score_tile(rows, kv, token, count, values, keys, d0, scratch, q_at, scores_at):
    """scores[r, t] = q[r] . key[t] for 1 to MOST_ROWS rows and the 32 tokens of a subpage; see attention_float.score_tile."""
    _scores(rows, kv, token, 0, values, keys, scratch, q_at, scores_at)
    if AT_ONCE == 1:
        _scores(rows, kv, token, 16, -1, -1, scratch, q_at, scores_at)


@inlined
def _scores(rows, kv, token, first, values, keys, scratch, q_at, scores_at):
    """Of 16 * AT_ONCE tokens of the subpage, from `first` on."""
    acc, key, behind = _score_sums(), _score_keys(), q_at + kv.size // 2
    for n in range(0, SUBPAGE, 16):
        if values >= 0:
            prefetch_beside(kv.scales, values + n)
        if keys >= 0:
            prefetch_beside(kv.scales, keys + n)
    for r in range(2 * rows):
        for n in range(AT_ONCE):
            acc[r, n] = splat_i32(NOTHING)
    at = token * kv.size + 4 * first
    for d in range(0, kv.size, 16):
        for i in range(4):
            row = (d + 4 * i) * SUBPAGE
            for n in range(0, 4 * SUBPAGE, 64):
                if values >= 0:
                    prefetch_beside(kv.numbers, values * kv.size + row + n)
                if keys >= 0:
                    prefetch_beside(kv.numbers, keys * kv.size + row + n)
            for n in range(AT_ONCE):
                key[n] = load_u8(kv.numbers, at + row + 64 * n)
            for r in range(rows):
                word, s = q_at + r * kv.size + d // 2 + i, 2 * r + SECOND_SUM
                first_q, second_q = repeat4(load_word(scratch, word)), repeat4(load_word(scratch, word + SECOND))
                for n in range(AT_ONCE):
                    acc[2 * r, n] = wide_first_unsigned(acc[2 * r, n], key[n], first_q)
                    acc[s, n] = wide_second_unsigned(acc[s, n], key[n], second_q)
    for r in range(rows):
        scale = splat_f32(load_scalar_f32(scratch, behind + r * kv.size))
        start = start_wide(splat_i32(load_word(scratch, behind + r * kv.size + 1)))
        for n in range(AT_ONCE):
            total, to = to_f32(join_sums(acc[2 * r, n], acc[2 * r + SECOND_SUM, n]) + start), first + 16 * n
            store_f32(scratch, scores_at + r * SPLIT + to, total * (load_f32(kv.scales, token + to) * scale))


def value_tile(width: int):
    """sums[r] += sum over t of weight[r, t] * value[t], in integers; see attention_float.value_tile."""
    new_acc, new_value = tile(i32x16, 2 * MOST_ROWS, width), tile(u8x64, width)

    @inlined
    def accumulate(rows, kv, token, count, values, keys, d, scratch, weights_at, sums_at):
        acc, value = new_acc(), new_value()
        if keys >= 0 and d == 0:
            for n in range(0, SUBPAGE, 16):
                prefetch_beside(kv.scales, keys + n)
        for r in range(2 * rows):
            for j in range(width):
                acc[r, j] = splat_i32(NOTHING)
        for t in range(0, count, 16):
            for i in range(4):
                row = (t + 4 * i) * kv.size + 4 * d
                for j in range(width):
                    if keys >= 0:
                        # One line after the other, whatever the order of values: so the CPU asks ahead by itself.
                        asked = d * SUBPAGE + (t // 4 + i) * 64 * width + 64 * j
                        prefetch_beside(kv.numbers, keys * kv.size + asked)
                    value[j] = load_u8(kv.numbers, token * kv.size + row + 64 * j)
                for r in range(rows):
                    word, s = weights_at + r * SPLIT + t // 2 + i, 2 * r + SECOND_SUM
                    first_w, second_w = repeat4(load_word(scratch, word)), repeat4(load_word(scratch, word + SECOND))
                    for j in range(width):
                        acc[2 * r, j] = wide_first_signed(acc[2 * r, j], value[j], first_w)
                        acc[s, j] = wide_second_signed(acc[s, j], value[j], second_w)
        for r in range(rows):
            for j in range(width):
                to = sums_at + r * kv.size + d + 16 * j
                store_i32(scratch, to, load_i32(scratch, to) + join_sums(acc[2 * r, j], acc[2 * r + SECOND_SUM, j]))

    return accumulate
