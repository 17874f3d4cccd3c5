"""Attention's tiles for int8 pages: scores and sums as products of bytes with wide integers.

Queries and the weights of values are wide integers, see `wide`; queries have their negated sum after their scale.
"""

import numpy as np

from .attention_float import AT_ONCE, MOST_ROWS
from .attention_span import key_at, keys_beside, prefetch_scales, subpages_of, value_at
from .dot import start_wide, wide_first_signed, wide_first_unsigned, wide_second_signed, wide_second_unsigned
from .jit import inlined, kernel
from .memory import CACHE_LINE
from .pages import SPLIT, SUBPAGE, advance, cursor_at
from .prefetching import Prefetch, no_prefetch
from .simd import i32x16, repeat4, splat_f32, splat_i32, tile, to_f32, u8x64
from .simd_lanes import keep_lanes
from .simd_memory import compiler_barrier, load_f32, load_scalar_f32, load_u8, load_word, prefetch_soon, store_f32
from .wide import SECOND, SECOND_SUM, join_sums, largest, make_to_wide

# Prefetches are spread evenly. While scores become weights, each of the first LATE rows prefetches one of the split's
# last LATE subpages of values; while weights become integers, one of the first LATE subpages of the next keys. With
# fewer than LATE rows the tiles prefetch everything.
SUBPAGES, LATE = SPLIT // SUBPAGE, 3
ZERO, NOTHING = np.float32(0), np.int32(0)

_score_sums, _score_keys = tile(i32x16, 2 * MOST_ROWS, AT_ONCE), tile(u8x64, AT_ONCE)

_widen_query, _widen_weights = make_to_wide(minus=True), make_to_wide(minus=False)


@kernel
def widen_queries(kv, rows, scratch, at):
    """Turn rows of queries into wide integers, as score tiles read them."""
    for row in range(at, at + rows * kv.size, kv.size):
        most = largest(scratch, row, kv.size)
        _widen_query(scratch, row, 0, kv.size, kv.size // 2, most, no_prefetch(kv.numbers))


@kernel
def load_scales(kv, span, scratch, to):
    """Load the scales of the span's values, then 0 up to a multiple of 16."""
    cursor = cursor_at(kv, span.first)
    for subpage in range(span.first, span.end, SUBPAGE):
        token = value_at(kv, span, cursor)
        for p in range(subpage, min(subpage + SUBPAGE, span.end), 16):
            # Scales beyond the end are not this text's.
            scales = keep_lanes(load_f32(kv.scales, token + p - subpage), 0, span.end - p, ZERO)
            store_f32(scratch, to + p - span.first, scales)
        cursor = advance(kv, cursor, kv.size)


@kernel
def beside(rows, count):
    """How much of `count`, a multiple of SUBPAGES, the tiles prefetch where there are so many rows.

    Tiles may pass their own number: only the first one prefetches, and it has LATE rows if there are as many.
    """
    return count - count // SUBPAGES * LATE if rows >= LATE else count


@kernel
def late_values(kv, span, rows, r):
    """The values to prefetch while scores of row r, of so many rows, become weights."""
    position = span.first + (max(subpages_of(span) - LATE, 0) + r) * SUBPAGE
    if rows < LATE or r >= LATE or position >= span.end:
        return no_prefetch(kv.numbers)
    return _beside_row(kv, value_at(kv, span, cursor_at(kv, position)))


@kernel
def first_keys(kv, span, rows, r):
    """The keys to prefetch while weights of row r become integers."""
    if rows < LATE or r >= LATE:
        return no_prefetch(kv.numbers)
    token = key_at(kv, span, cursor_at(kv, span.ahead + r * SUBPAGE))
    return _beside_row(kv, token) if token >= 0 else no_prefetch(kv.numbers)


@kernel
def _beside_row(kv, token):
    """A subpage, to be prefetched along a row of SPLIT numbers; its scales are prefetched at once."""
    prefetch_scales(kv, token)
    return Prefetch(kv.numbers, token * kv.size, kv.size * 16 // SUBPAGES)


@kernel
def widen_weights(scratch, at, first, end, most, prefetch):
    """Turn a row's weights times scales, `most` at most, into wide integers. Meanwhile it runs `prefetch`."""
    _widen_weights(scratch, at, first, end, SPLIT // 2, most, prefetch)


@inlined
def score_tile(rows, kv, part, prefetches, scratch, q_at, scores_at):
    """scores[r, t] = q[r] . key[t], as in attention_float.score_tile.

    Only as much of the values is prefetched as `beside` says.
    """
    token, values, keys = part
    if not prefetches:
        values, keys = -1, -1
    _scores(rows, kv, token, 0, values, keys, scratch, q_at, scores_at)
    if AT_ONCE == 1:
        _scores(rows, kv, token, 16, -1, -1, scratch, q_at, scores_at)


@inlined
def _scores(rows, kv, token, first, values, keys, scratch, q_at, scores_at):
    """Scores of 16 * AT_ONCE tokens of the subpage, from `first` on."""
    acc, key, behind = _score_sums(), _score_keys(), q_at + kv.size // 2
    for r in range(2 * rows):
        for n in range(AT_ONCE):
            acc[r, n] = splat_i32(NOTHING)
    at = token * kv.size + 4 * first
    for d in range(0, kv.size, 16):
        for i in range(4):
            row = (d + 4 * i) * SUBPAGE
            for n in range(0, 4 * SUBPAGE, CACHE_LINE):
                # Among the 8 lines of 16 columns.
                line = 2 * i + n // CACHE_LINE
                if values >= 0 and line < beside(rows, 8):
                    prefetch_soon(kv.numbers, values + (d // 16 * beside(rows, 8) + line) * CACHE_LINE)
                if keys >= 0:
                    prefetch_soon(kv.numbers, keys + row + n)
            for n in range(AT_ONCE):
                key[n] = load_u8(kv.numbers, at + row + 64 * n)
            for r in range(rows):
                word, s = q_at + r * kv.size + d // 2 + i, 2 * r + SECOND_SUM
                first_q, second_q = repeat4(load_word(scratch, word)), repeat4(load_word(scratch, word + SECOND))
                for n in range(AT_ONCE):
                    acc[2 * r, n] = wide_first_unsigned(acc[2 * r, n], key[n], first_q)
                    acc[s, n] = wide_second_unsigned(acc[s, n], key[n], second_q)
            # Also in tiles that prefetch nothing: without it there, all of attention was slower, unlike with floats.
            compiler_barrier()
    for r in range(rows):
        scale = splat_f32(load_scalar_f32(scratch, behind + r * kv.size))
        start = start_wide(splat_i32(load_word(scratch, behind + r * kv.size + 1)))
        for n in range(AT_ONCE):
            total, to = to_f32(join_sums(acc[2 * r, n], acc[2 * r + SECOND_SUM, n]) + start), first + 16 * n
            store_f32(scratch, scores_at + r * SPLIT + to, total * (load_f32(kv.scales, token + to) * scale))


def value_tile(width: int):
    """sums[r] = sum over t of weight[r, t] * value[t], from integers; see attention_float.value_tile."""
    new_acc, new_value = tile(i32x16, 2 * MOST_ROWS, width), tile(u8x64, width)

    @inlined
    def accumulate(rows, kv, part, prefetches, scratch, weights_at, sums_at):
        span, d = part
        acc, value = new_acc(), new_value()
        # Lines of keys prefetched with 4 * width lines of 16 values, and their columns with a subpage of values.
        lines = beside(rows, 8) * width // 2
        columns = lines * (SUBPAGE // 16) * CACHE_LINE // SUBPAGE
        for r in range(2 * rows):
            for j in range(width):
                acc[r, j] = splat_i32(NOTHING)
        cursor, ahead = (
            cursor_at(kv, span.first),
            keys_beside(kv, span, LATE if rows >= LATE else 0, d // (16 * width) * columns),
        )
        for p in range(span.first, span.end, SUBPAGE):
            at, weights = value_at(kv, span, cursor) * kv.size + 4 * d, weights_at + p % SPLIT // 2
            keys = key_at(kv, span, ahead) if prefetches else -1
            asked = keys * kv.size + ahead.column * SUBPAGE
            if keys >= 0 and ahead.column < columns:
                prefetch_scales(kv, keys)
            for t in range(0, min(SUBPAGE, span.end - p), 16):
                for i in range(4):
                    for j in range(width):
                        line = i * width + j
                        if keys >= 0 and line < lines:
                            prefetch_soon(kv.numbers, asked + (t // 16 * lines + line) * CACHE_LINE)
                        value[j] = load_u8(kv.numbers, at + (t + 4 * i) * kv.size + 64 * j)
                    for r in range(rows):
                        word, s = weights + r * SPLIT + t // 2 + i, 2 * r + SECOND_SUM
                        first_w = repeat4(load_word(scratch, word))
                        second_w = repeat4(load_word(scratch, word + SECOND))
                        for j in range(width):
                            acc[2 * r, j] = wide_first_signed(acc[2 * r, j], value[j], first_w)
                            acc[s, j] = wide_second_signed(acc[s, j], value[j], second_w)
                    compiler_barrier()
            cursor, ahead = advance(kv, cursor, kv.size), advance(kv, ahead, columns)
        for r in range(rows):
            scale = splat_f32(load_scalar_f32(scratch, weights_at + r * SPLIT + SPLIT // 2))
            for j in range(width):
                total = to_f32(join_sums(acc[2 * r, j], acc[2 * r + SECOND_SUM, j]))
                store_f32(scratch, sums_at + r * kv.size + d + 16 * j, total * scale)

    return accumulate
