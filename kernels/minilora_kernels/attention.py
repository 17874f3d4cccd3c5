"""Attention over paged keys and values: attend from some rows of one kv head. See `pages` for how these lie in memory.

The positions of a sequence are cut into *splits*. Inside a split: scores, softmax, weighted sum of
values. Splits are merged in order by their maxima and sums (Milakov and Gimelshein 2018, arXiv:1805.02867;
Dao et al. 2022, arXiv:2205.14135). The cut depends on the position alone, so the bits of a row depend neither
on how its prompt was chunked nor on the rows or threads beside it.

Memory is asked for evenly: the values of a split beside its scores, and beside its sums the keys that this thread
needs next, of the same text or of the one that follows.
"""

import numpy as np
from numba.core.typing import signature

from . import attention_float, attention_int8, cpu
from .attention_float import AT_ONCE, MOST_ROWS
from .jit import kernel
from .kinds import FLOATS, INTEGERS, NUMBER, array, named
from .pages import KV, KV_DTYPES, KV_FLOAT16, KV_INT8, SPLIT, SUBPAGE, Query, first_seen, token_at, values_behind
from .simd import exp, fma, hmax, hsum, keep_lanes, splat_f32, vmax
from .simd_memory import load_f32, store_f32
from .unit import unit

# From how many rows on it pays to widen float16 keys for all of them.
MANY = 12 if cpu.vectors() >= 32 else 5
# How far ahead keys are asked for that were not asked for before.
AHEAD = 4 * SUBPAGE

ZERO, ONE = np.float32(0), np.float32(1)
LOWEST = np.float32(-np.inf)


def scratch_size(rows: int, size: int) -> int:
    """float32 numbers that `attend` needs for `rows` rows (tokens x group) of head size `size`."""
    return _padded(rows) * (3 * size + SPLIT + 4) + SUBPAGE * size


def partial_size(size: int) -> int:
    """float32 numbers of one row's unmerged result for one split."""
    return size + 2


def _padded(rows):
    return (rows + MOST_ROWS - 1) // MOST_ROWS * MOST_ROWS


_padded_rows = kernel(_padded)


@kernel
def _behind_queries(kv, q_at, rows):
    """Where in scratch a subpage's widened keys go."""
    return q_at + _padded_rows(rows) * kv.size


# ---------------------------------------------------------------- all rows of a subpage


def _in_tiles(tile):
    """All rows, tile by tile: of MOST_ROWS and what is left. Only the first tile asks for memory.

    Score tiles and value tiles take the same arguments, so that this serves both; `count` and `d` are for values, and
    `values` for scores, which alone prefetch them. source, target: where in scratch the first row's queries and scores are,
    or its weights and sums, and the next row's a step on.
    """

    @kernel
    def tiles(kv, token, count, values, keys, d, rows, scratch, source, step, target, target_step):
        r = 0
        while rows - r >= MOST_ROWS:
            tile(MOST_ROWS, kv, token, count, values, keys, d, scratch, source + r * step, target + r * target_step)
            r, values, keys = r + MOST_ROWS, -1, -1
        source, target = source + r * step, target + r * target_step
        if MOST_ROWS > 3 and rows - r == 3:
            tile(3, kv, token, count, values, keys, d, scratch, source, target)
        elif rows - r == 2:
            tile(2, kv, token, count, values, keys, d, scratch, source, target)
        elif rows - r == 1:
            tile(1, kv, token, count, values, keys, d, scratch, source, target)

    return tiles


def _make_scores(kv_format):
    if kv_format == KV_INT8:
        tiles = _in_tiles(attention_int8.score_tile)
    else:
        tiles = _in_tiles(attention_float.score_tile(kv_format))
    many = attention_float.many_scores(kv_format) if kv_format == KV_FLOAT16 else None

    @kernel
    def scores(kv, token, keys, rows, scratch, q_at, scores_at):
        """All rows against one subpage; meanwhile its values and the keys of token `keys` come nearer."""
        values = token + values_behind(kv)
        if many is not None and rows >= MANY:
            many(kv, token, values, keys, rows, scratch, q_at, _behind_queries(kv, q_at, rows), scores_at)
            return
        tiles(kv, token, SUBPAGE, values, keys, 0, rows, scratch, q_at, kv.size, scores_at, SPLIT)

    return scores


def _make_values(kv_format, head_unit):
    quantized = kv_format == KV_INT8
    # Integers want two sums for each number; as pairs of 16 bits, both bytes of each widened.
    width = AT_ONCE if quantized else 2 * AT_ONCE

    def for_width(width):
        if quantized:
            return _in_tiles(attention_int8.value_tile(width))
        return _in_tiles(attention_float.value_tile(width, kv_format))

    wide, columns = for_width(width), 16 * width
    narrow = for_width(1) if head_unit % columns else None

    @kernel
    def values(kv, token, count, keys, rows, scratch, weights, position, sums):
        """All rows, all columns: 16 * width at a time, a rest 16 at a time; meanwhile the keys of token `keys` come nearer.

        weights: where those of the split begin; position: the subpage's in the split.
        """
        at = weights + (position // 2 if quantized else position)
        whole = kv.size // columns * columns
        for d in range(0, whole, columns):
            wide(kv, token, count, -1, keys, d, rows, scratch, at, SPLIT, sums, kv.size)
        if narrow is not None:
            for d in range(whole, kv.size, 16):
                narrow(kv, token, count, -1, keys, d, rows, scratch, at, SPLIT, sums, kv.size)

    return values


# ---------------------------------------------------------------- one split


@kernel
def _kept(v, first, end, other):
    """keep_lanes, at no cost where all lanes count."""
    if first <= 0 and end >= 16:
        return v
    return keep_lanes(v, first, end, other)


@kernel
def _softmax_row(scratch, at, first, end, start, stop):
    """Scores to weights exp(score - maximum) in place: lanes first..end count, others of start..stop become 0.

    start and stop are multiples of 16. Returns (maximum, sum of weights); (-inf, 0) where no lane counts.
    """
    largest = splat_f32(LOWEST)
    for t in range(start, stop, 16):
        largest = vmax(_kept(load_f32(scratch, at + t), first - t, end - t, LOWEST), largest)
    maximum, total = hmax(largest), splat_f32(ZERO)
    for t in range(start, stop, 16):
        weight = splat_f32(ZERO)
        if first < end:
            weight = _kept(exp(load_f32(scratch, at + t) - splat_f32(maximum)), first - t, end - t, ZERO)
        store_f32(scratch, at + t, weight)
        total = total + weight
    return maximum, hsum(total)


@kernel
def _merge_row(sums, at, size, maximum, total, more, more_at, more_maximum, more_total):
    """Merge a later split into (sums, maximum, total); returns the new maximum and total."""
    if more_total == ZERO:
        return maximum, total
    if total == ZERO:
        for d in range(0, size, 16):
            store_f32(sums, at + d, load_f32(more, more_at + d))
        return more_maximum, more_total
    larger = max(maximum, more_maximum)
    keep, take = np.exp(maximum - larger), np.exp(more_maximum - larger)
    for d in range(0, size, 16):
        kept = load_f32(sums, at + d) * splat_f32(keep)
        store_f32(sums, at + d, fma(load_f32(more, more_at + d), splat_f32(take), kept))
    return larger, total * keep + more_total * take


@kernel
def _divide_row(sums, at, size, total, out, out_at):
    inverse = splat_f32(ONE / total)
    for d in range(0, size, 16):
        store_f32(out, out_at + d, load_f32(sums, at + d) * inverse)


@kernel
def _next_keys(query, split, splits, following):
    """(query, position): the keys that follow those of a split, in its own text or in the next one."""
    if split + 1 < splits:
        return query, (split + 1) * SPLIT
    return following, first_seen(following, 0)


def _make_split(kv_format, head_unit):
    scores, values, quantized = _make_scores(kv_format), _make_values(kv_format, head_unit), kv_format == KV_INT8

    @kernel
    def attend_split(kv, query, pages, split, asked, following, ahead, scratch, q_at, weights, sums, state):
        """One split for all rows: sums of values and, in state, each row's maximum and total weight.

        asked: up to which position keys were asked for; ahead: from which one on those of `following` come next.
        Returns up to which they were asked for.
        """
        rows, last = query.tokens * query.group, query.position + query.tokens
        start, end = split * SPLIT, min(split * SPLIT + SPLIT, last)
        first = first_seen(query, start)
        stop = start + (end - start + 15) // 16 * 16
        for p in range(first, end, SUBPAGE):
            keys = token_at(kv, query, pages, p + AHEAD) if asked <= p + AHEAD < end else -1
            scores(kv, token_at(kv, query, pages, p), keys, rows, scratch, q_at, weights + p - start)
        for r in range(rows):
            own = query.position + r // query.group
            low = max(first, own - query.window + 1) if query.window > 0 else first
            scratch[state + 2 * r], scratch[state + 2 * r + 1] = _softmax_row(
                scratch, weights + r * SPLIT, low - start, min(own + 1, end) - start, first - start, stop - start
            )
        for i in range(0, rows * kv.size, 16):
            store_f32(scratch, sums + i, splat_f32(ZERO))
        if quantized and first < end:
            attention_int8.widen_weights(kv, query, pages, first, end, rows, scratch, weights)
        beyond = following.position + following.tokens
        for p in range(first, end, SUBPAGE):
            keys = token_at(kv, following, pages, ahead) if ahead < beyond else -1
            token = token_at(kv, query, pages, p) + values_behind(kv)
            values(kv, token, min(SUBPAGE, end - p), keys, rows, scratch, weights, p - start, sums)
            ahead += SUBPAGE
        if quantized and first < end:
            attention_int8.sums_to_floats(kv, rows, scratch, weights, sums)
        return ahead

    return attend_split


def _signatures(kv_format: int, head_unit: int = 16):
    """Those of attend and attend_part."""
    kv, query, place = named(KV, array(KV_DTYPES[kv_format]), FLOATS), named(Query), (FLOATS, NUMBER)
    start, scratch = (kv, query, INTEGERS), place
    return (
        signature(NUMBER, *start, NUMBER, query, *place, NUMBER, *place, NUMBER, *scratch),
        signature(NUMBER, *start, NUMBER, NUMBER, query, NUMBER, *place, NUMBER, *place, *scratch),
    )


@unit(_signatures)
def make_attention(kv_format: int, head_unit: int = 16):
    """(attend, attend_part) for a pool of this format; merge_parts serves all.

    head_unit: what the heads' size is a multiple of, 16 or 64; with 64 there is less to compile.
    """
    attend_split, quantized = _make_split(kv_format, head_unit), kv_format == KV_INT8

    @kernel
    def load_queries(kv, query, q, q_at, q_stride, scratch, to):
        factor = splat_f32(ONE / np.sqrt(np.float32(kv.size)))
        for r in range(query.tokens * query.group):
            at = q_at + r // query.group * q_stride + r % query.group * kv.size
            for d in range(0, kv.size, 16):
                store_f32(scratch, to + r * kv.size + d, load_f32(q, at + d) * factor)
        if quantized:
            attention_int8.widen_queries(kv, query.tokens * query.group, scratch, to)

    @kernel
    def attend(kv, query, pages, asked, following, q, q_at, q_stride, out, out_at, out_stride, scratch, scratch_at):
        """out = softmax(q . keys / sqrt(size)) . values, over the positions up to each token's own.

        query: Query; pages: int64 page numbers; q, out: float32, token t at t * stride, its heads side by side;
        scratch: float32, scratch_size(tokens * group, size) numbers from scratch_at. asked: up to which position this
        thread asked for keys before; following: the Query that it serves next, one of 0 tokens where there is none.
        Returns `asked` for that.
        """
        rows, padded = query.tokens * query.group, _padded_rows(query.tokens * query.group)
        more = _behind_queries(kv, scratch_at, rows) + SUBPAGE * kv.size
        sums = more + padded * kv.size
        weights = sums + padded * kv.size
        state = weights + padded * SPLIT
        load_queries(kv, query, q, q_at, q_stride, scratch, scratch_at)
        splits = (query.position + query.tokens + SPLIT - 1) // SPLIT
        split0 = first_seen(query, 0) // SPLIT
        then, ahead = _next_keys(query, split0, splits, following)
        asked = attend_split(kv, query, pages, split0, asked, then, ahead, scratch, scratch_at, weights, sums, state)
        more_state = state + 2 * padded
        for split in range(split0 + 1, splits):
            then, ahead = _next_keys(query, split, splits, following)
            asked = attend_split(
                kv, query, pages, split, asked, then, ahead, scratch, scratch_at, weights, more, more_state
            )
            for r in range(rows):
                mine, other = state + 2 * r, more_state + 2 * r
                scratch[mine], scratch[mine + 1] = _merge_row(
                    scratch,
                    sums + r * kv.size,
                    kv.size,
                    scratch[mine],
                    scratch[mine + 1],
                    scratch,
                    more + r * kv.size,
                    scratch[other],
                    scratch[other + 1],
                )
        for r in range(rows):
            to = out_at + r // query.group * out_stride + r % query.group * kv.size
            _divide_row(scratch, sums + r * kv.size, kv.size, scratch[state + 2 * r + 1], out, to)
        return asked

    @kernel
    def attend_part(
        kv, query, pages, split, asked, following, then, q, q_at, q_stride, parts, parts_at, scratch, scratch_at
    ):
        """One split of `attend`, not merged: size + 2 numbers for each row, from parts_at on.

        They are its sums, its maximum and its total weight. then: the split of `following` that this thread serves
        next; all else and what it returns: as `attend`.
        """
        rows, padded = query.tokens * query.group, _padded_rows(query.tokens * query.group)
        sums = _behind_queries(kv, scratch_at, rows) + SUBPAGE * kv.size
        weights = sums + padded * kv.size
        state, to, ahead = weights + padded * SPLIT, parts_at, first_seen(following, then * SPLIT)
        load_queries(kv, query, q, q_at, q_stride, scratch, scratch_at)
        asked = attend_split(
            kv, query, pages, split, asked, following, ahead, scratch, scratch_at, weights, sums, state
        )
        for r in range(rows):
            for d in range(0, kv.size, 16):
                store_f32(parts, to + d, load_f32(scratch, sums + r * kv.size + d))
            parts[to + kv.size], parts[to + kv.size + 1] = scratch[state + 2 * r], scratch[state + 2 * r + 1]
            to += kv.size + 2
        return asked

    return attend, attend_part


@kernel
def merge_parts(parts, parts_at, splits, rows, row, size, out, out_at):
    """Merge row `row` of `splits` neighbouring results of attend_part, in order, into `size` float32 from out_at.

    The first split's sums are overwritten. The bits are those that `attend` gives.
    """
    step = rows * (size + 2)
    at = parts_at + row * (size + 2)
    maximum, total = parts[at + size], parts[at + size + 1]
    for split in range(1, splits):
        other = at + split * step
        maximum, total = _merge_row(
            parts, at, size, maximum, total, parts, other, parts[other + size], parts[other + size + 1]
        )
    _divide_row(parts, at, size, total, out, out_at)
