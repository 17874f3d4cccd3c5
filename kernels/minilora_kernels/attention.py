"""Attention over paged keys and values: write a token, attend from some rows of one kv head.

A page holds `page` tokens of one sequence (a multiple of 32) for every layer and kv head, as subpages of 32
tokens: keys [D][32], so that the scores of 16 tokens are one vector and need no horizontal sums; values [32][D].
Of RUN pages with neighbouring numbers the parts of one layer and head lie together: a sequence that holds such
pages is read in longer runs. Number formats: float32, float16, int8 with a float32 scale for each token and head.

The positions of a sequence are cut into *splits* of 256. Inside a split: scores, softmax, weighted sum of
values. Splits are merged in order by their maxima and sums (Milakov and Gimelshein 2018, arXiv:1805.02867;
Dao et al. 2022, arXiv:2205.14135). The cut depends on the position alone, so the bits of a row depend neither
on how its prompt was chunked nor on the rows or threads beside it.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from .jit import kernel
from .simd import (
    exp,
    f32x16,
    fma,
    hmax,
    hsum,
    keep_lanes,
    load_f16,
    load_f32,
    load_i8,
    load_scalar_f32,
    prefetch_beside,
    round_i32,
    scatter_f16,
    scatter_f32,
    scatter_i8,
    splat_f32,
    store_f16,
    store_f32,
    store_i8,
    tile,
    vabs,
    vmax,
)

KV_FLOAT32, KV_FLOAT16, KV_INT8 = range(3)
KV_NAMES = ("float32", "float16", "int8")
SUBPAGE = 32
RUN = 4
AHEAD = 4 * SUBPAGE
SPLIT = 256

_LOAD = {KV_FLOAT32: load_f32, KV_FLOAT16: load_f16, KV_INT8: load_i8}
# Numbers in a cache line.
_LINE = {KV_FLOAT32: 16, KV_FLOAT16: 32, KV_INT8: 64}

ZERO, ONE = np.float32(0), np.float32(1)
LOWEST = np.float32(-np.inf)
LARGEST_INT8 = np.float32(127)


class KV(NamedTuple):
    """The page pool.

    keys, values: flat [pages, layers, heads, page / 32] of [size, 32] and [32, size]; float32, uint16 holding
    float16, or int8. key_scales, value_scales: float32, flat [pages, layers, heads, page]; int8 only.
    """

    keys: np.ndarray
    values: np.ndarray
    key_scales: np.ndarray
    value_scales: np.ndarray
    layers: int
    heads: int
    size: int
    page: int


class Query(NamedTuple):
    """Some tokens of one sequence, seen by the query heads that share one kv head.

    position: of the first token; tokens: how many; group: query heads per kv head; window: how many positions a
    token sees, its own included, 0 for all; pages_at: where the sequence's page numbers start.
    """

    layer: int
    head: int
    group: int
    position: int
    tokens: int
    window: int
    pages_at: int


def scratch_size(rows: int, size: int) -> int:
    """float32 numbers that `attend` needs for `rows` rows (tokens x group) of head size `size`."""
    return _padded(rows) * (3 * size + SPLIT + 4)


def partial_size(size: int) -> int:
    """float32 numbers of one row's unmerged result for one split."""
    return size + 2


def _padded(rows):
    return (rows + 3) // 4 * 4


_padded_rows = kernel(_padded)


@kernel
def _first_token(kv, layer, page, head):
    """Number of tokens of one kv head stored before this page's."""
    run = (page // RUN * kv.layers + layer) * kv.heads + head
    return (run * RUN + page % RUN) * kv.page


# ---------------------------------------------------------------- write


@kernel
def _scale_of(x, at, size):
    largest = splat_f32(ZERO)
    for i in range(0, size, 16):
        largest = vmax(vabs(load_f32(x, at + i)), largest)
    return hmax(largest) / LARGEST_INT8


def _make_write(kv_format):
    scatter, store = {KV_FLOAT32: (scatter_f32, store_f32), KV_FLOAT16: (scatter_f16, store_f16)}.get(
        kv_format, (scatter_i8, store_i8)
    )
    quantized = kv_format == KV_INT8

    @kernel
    def write_key(kv, layer, page, slot, head, x, at):
        """Store a token's key of one kv head: x[at : at + size], float32, as token `slot` of the page."""
        token = _first_token(kv, layer, page, head) + slot
        to = token // SUBPAGE * SUBPAGE * kv.size + token % SUBPAGE
        if quantized:
            scale = _scale_of(x, at, kv.size)
            kv.key_scales[token] = scale
            inverse = splat_f32(ONE / scale if scale > ZERO else ZERO)
        for d in range(0, kv.size, 16):
            v = load_f32(x, at + d)
            if quantized:
                v = round_i32(v * inverse)
            scatter(kv.keys, to + d * SUBPAGE, SUBPAGE, v)

    @kernel
    def write_value(kv, layer, page, slot, head, x, at):
        """Store a token's value of one kv head: x[at : at + size], float32, as token `slot` of the page."""
        token = _first_token(kv, layer, page, head) + slot
        if quantized:
            scale = _scale_of(x, at, kv.size)
            kv.value_scales[token] = scale
            inverse = splat_f32(ONE / scale if scale > ZERO else ZERO)
        for d in range(0, kv.size, 16):
            v = load_f32(x, at + d)
            if quantized:
                v = round_i32(v * inverse)
            store(kv.values, token * kv.size + d, v)

    return write_key, write_value


# ---------------------------------------------------------------- tiles


def _score_tile(rows: int, kv_format: int):
    """scores[r, t] = q[r] . key[t] for `rows` rows and the 32 tokens of a subpage.

    With values >= 0 the values of token `values` and its subpage are prefetched, with keys >= 0 the keys likewise.
    """
    load, quantized, line = _LOAD[kv_format], kv_format == KV_INT8, _LINE[kv_format]
    # Columns: two halves of the subpage, for each two sums over every second d, so that no FMA waits for another.
    new_acc = tile(f32x16, rows, 4)

    @kernel
    def score(kv, token, values, keys, scratch, q_at, scores_at):
        acc = new_acc()
        for r in range(rows):
            for n in range(4):
                acc[r, n] = splat_f32(ZERO)
        at = token * kv.size
        for d in range(0, kv.size, 2):
            for c in range(2):
                row = (d + c) * SUBPAGE
                # Of int8 a cache line holds two rows, and is asked for once.
                for n in range(0, SUBPAGE, line):
                    if values >= 0 and (c + 1) * SUBPAGE % line == 0:
                        prefetch_beside(kv.values, values * kv.size + row + n)
                    if keys >= 0 and (c + 1) * SUBPAGE % line == 0:
                        prefetch_beside(kv.keys, keys * kv.size + row + n)
                low, high = load(kv.keys, at + row), load(kv.keys, at + row + 16)
                for r in range(rows):
                    q = splat_f32(load_scalar_f32(scratch, q_at + r * kv.size + d + c))
                    acc[r, c] = fma(low, q, acc[r, c])
                    acc[r, 2 + c] = fma(high, q, acc[r, 2 + c])
        for r in range(rows):
            for n in range(2):
                total = acc[r, 2 * n] + acc[r, 2 * n + 1]
                if quantized:
                    total = total * load_f32(kv.key_scales, token + 16 * n)
                store_f32(scratch, scores_at + r * SPLIT + 16 * n, total)

    return score


def _value_tile(rows: int, width: int, kv_format: int):
    """sums[r] += sum over t of weight[r, t] * value[t] for `rows` rows, 16 * width columns, `count` tokens.

    With keys >= 0 the keys of token `keys` and its subpage are prefetched.
    """
    load, line = _LOAD[kv_format], _LINE[kv_format]
    new_acc, new_value = tile(f32x16, rows, width), tile(f32x16, width)

    @kernel
    def accumulate(kv, token, count, keys, d, scratch, weights_at, sums_at):
        acc, value = new_acc(), new_value()
        for r in range(rows):
            for j in range(width):
                acc[r, j] = load_f32(scratch, sums_at + r * kv.size + d + 16 * j)
        for t in range(count):
            at = (token + t) * kv.size + d
            for j in range(width):
                if keys >= 0 and 16 * j % line == 0:
                    prefetch_beside(kv.keys, (keys + t) * kv.size + d + 16 * j)
                value[j] = load(kv.values, at + 16 * j)
            for r in range(rows):
                weight = splat_f32(load_scalar_f32(scratch, weights_at + r * SPLIT + t))
                for j in range(width):
                    acc[r, j] = fma(value[j], weight, acc[r, j])
        for r in range(rows):
            for j in range(width):
                store_f32(scratch, sums_at + r * kv.size + d + 16 * j, acc[r, j])

    return accumulate


def _make_scores(kv_format):
    four, three, two, one = (_score_tile(rows, kv_format) for rows in (4, 3, 2, 1))

    @kernel
    def scores(kv, token, keys, rows, scratch, q_at, scores_at):
        """All rows against one subpage; meanwhile its values and the keys of token `keys` come nearer."""
        r, values = 0, token
        while rows - r >= 4:
            four(kv, token, values, keys, scratch, q_at + r * kv.size, scores_at + r * SPLIT)
            r, values, keys = r + 4, -1, -1
        if rows - r == 3:
            three(kv, token, values, keys, scratch, q_at + r * kv.size, scores_at + r * SPLIT)
        elif rows - r == 2:
            two(kv, token, values, keys, scratch, q_at + r * kv.size, scores_at + r * SPLIT)
        elif rows - r == 1:
            one(kv, token, values, keys, scratch, q_at + r * kv.size, scores_at + r * SPLIT)

    return scores


def _make_values(kv_format, unit):
    quantized = kv_format == KV_INT8

    def for_width(width):
        four, three, two, one = (_value_tile(rows, width, kv_format) for rows in (4, 3, 2, 1))

        @kernel
        def values(kv, token, count, keys, d, rows, scratch, weights_at, sums_at):
            r = 0
            while rows - r >= 4:
                four(kv, token, count, keys, d, scratch, weights_at + r * SPLIT, sums_at + r * kv.size)
                r, keys = r + 4, -1
            if rows - r == 3:
                three(kv, token, count, keys, d, scratch, weights_at + r * SPLIT, sums_at + r * kv.size)
            elif rows - r == 2:
                two(kv, token, count, keys, d, scratch, weights_at + r * SPLIT, sums_at + r * kv.size)
            elif rows - r == 1:
                one(kv, token, count, keys, d, scratch, weights_at + r * SPLIT, sums_at + r * kv.size)

        return values

    wide, narrow = for_width(4), for_width(1) if unit % 64 else None

    @kernel
    def values(kv, token, count, keys, rows, scratch, weights_at, sums_at):
        """All rows, all columns: 64 at a time, a rest 16 at a time; meanwhile the keys of token `keys` come nearer."""
        if quantized:
            for r in range(rows):
                for t in range(weights_at + r * SPLIT, weights_at + r * SPLIT + SUBPAGE, 16):
                    scale = load_f32(kv.value_scales, token + t - weights_at - r * SPLIT)
                    store_f32(scratch, t, load_f32(scratch, t) * scale)
        whole = kv.size // 64 * 64
        for d in range(0, whole, 64):
            wide(kv, token, count, keys, d, rows, scratch, weights_at, sums_at)
        if narrow is not None:
            for d in range(whole, kv.size, 16):
                narrow(kv, token, count, keys, d, rows, scratch, weights_at, sums_at)

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
def _token_at(kv, query, pages, position):
    """Where the token at a position of the query's sequence is stored, counted in tokens."""
    page = pages[query.pages_at + position // kv.page]
    return _first_token(kv, query.layer, page, query.head) + position % kv.page


@kernel
def _first_seen(query, start):
    """The first subpage's position that any row of the query sees, in the split that begins at `start`."""
    if query.window == 0:
        return start
    return max(start, (query.position - query.window + 1) // SUBPAGE * SUBPAGE)


def _make_split(kv_format, unit):
    scores, values = _make_scores(kv_format), _make_values(kv_format, unit)

    @kernel
    def attend_split(kv, query, pages, split, begins, goes_on, scratch, q_at, weights, sums, state):
        """One split for all rows: sums of values and, in state, each row's maximum and total weight.

        begins: this thread did not attend to the split before; goes_on: it will to the next. Memory is asked for
        evenly: the values of a split beside its scores, the keys of the next one beside its sums.
        """
        rows, last = query.tokens * query.group, query.position + query.tokens
        start, end = split * SPLIT, min(split * SPLIT + SPLIT, last)
        first = _first_seen(query, start)
        stop = start + (end - start + 15) // 16 * 16
        for p in range(first, end, SUBPAGE):
            keys = _token_at(kv, query, pages, p + AHEAD) if begins and p + AHEAD < end else -1
            scores(kv, _token_at(kv, query, pages, p), keys, rows, scratch, q_at, weights + p - start)
        for r in range(rows):
            own = query.position + r // query.group
            low = max(first, own - query.window + 1) if query.window > 0 else first
            scratch[state + 2 * r], scratch[state + 2 * r + 1] = _softmax_row(
                scratch, weights + r * SPLIT, low - start, min(own + 1, end) - start, first - start, stop - start
            )
        for i in range(0, rows * kv.size, 16):
            store_f32(scratch, sums + i, splat_f32(ZERO))
        for p in range(first, end, SUBPAGE):
            token = _token_at(kv, query, pages, p)
            keys = _token_at(kv, query, pages, p + SPLIT) if goes_on and p + SPLIT < last else -1
            values(kv, token, min(SUBPAGE, end - p), keys, rows, scratch, weights + p - start, sums)

    return attend_split


@cache
def make_attention(kv_format: int, unit: int = 16):
    """(write_key, write_value, attend, attend_parts) for a pool of this format; merge_parts serves all.

    unit: what the heads' size is a multiple of, 16 or 64; with 64 there is less to compile.
    """
    attend_split = _make_split(kv_format, unit)

    @kernel
    def load_queries(kv, query, q, q_at, q_stride, scratch, to):
        factor = splat_f32(ONE / np.sqrt(np.float32(kv.size)))
        for r in range(query.tokens * query.group):
            at = q_at + r // query.group * q_stride + r % query.group * kv.size
            for d in range(0, kv.size, 16):
                store_f32(scratch, to + r * kv.size + d, load_f32(q, at + d) * factor)

    @kernel
    def attend(kv, query, pages, q, q_at, q_stride, out, out_at, out_stride, scratch, scratch_at):
        """out = softmax(q . keys / sqrt(size)) . values, over the positions up to each token's own.

        query: Query; pages: int64 page numbers; q, out: float32, token t at t * stride, its heads side by side;
        scratch: float32, scratch_size(tokens * group, size) numbers from scratch_at.
        """
        rows, padded = query.tokens * query.group, _padded_rows(query.tokens * query.group)
        more = scratch_at + padded * kv.size
        sums = more + padded * kv.size
        weights = sums + padded * kv.size
        state = weights + padded * SPLIT
        load_queries(kv, query, q, q_at, q_stride, scratch, scratch_at)
        splits = (query.position + query.tokens + SPLIT - 1) // SPLIT
        split0 = max(0, query.position - query.window + 1) // SPLIT if query.window > 0 else 0
        attend_split(kv, query, pages, split0, True, True, scratch, scratch_at, weights, sums, state)
        more_state = state + 2 * padded
        for split in range(split0 + 1, splits):
            attend_split(kv, query, pages, split, False, True, scratch, scratch_at, weights, more, more_state)
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

    @kernel
    def attend_parts(kv, query, pages, split0, split1, q, q_at, q_stride, parts, parts_at, scratch, scratch_at):
        """Splits split0 .. split1 of `attend`, not merged: rows x (size + 2) numbers each, from parts_at on.

        Row r's sums, maximum and total are at r * (size + 2).
        """
        rows, padded = query.tokens * query.group, _padded_rows(query.tokens * query.group)
        sums = scratch_at + padded * kv.size
        weights = sums + padded * kv.size
        state, to = weights + padded * SPLIT, parts_at
        load_queries(kv, query, q, q_at, q_stride, scratch, scratch_at)
        for split in range(split0, split1):
            begins, goes_on = split == split0, split + 1 < split1
            attend_split(kv, query, pages, split, begins, goes_on, scratch, scratch_at, weights, sums, state)
            for r in range(rows):
                for d in range(0, kv.size, 16):
                    store_f32(parts, to + d, load_f32(scratch, sums + r * kv.size + d))
                parts[to + kv.size], parts[to + kv.size + 1] = scratch[state + 2 * r], scratch[state + 2 * r + 1]
                to += kv.size + 2

    return *_make_write(kv_format), attend, attend_parts


@kernel
def merge_parts(parts, parts_at, splits, rows, row, size, out, out_at):
    """Merge row `row` of `splits` results of attend_parts, in order, into `size` float32 from out_at.

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
