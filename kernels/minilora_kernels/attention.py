"""Attention over paged keys and values, for some rows of one kv head. For how these lie in memory see `pages`.

The positions of a sequence are cut into *splits*. Inside a split: scores, softmax, weighted sum of
values. Splits are merged in order by their maxima and sums (Milakov and Gimelshein 2018, arXiv:1805.02867;
Dao et al. 2022, arXiv:2205.14135). The cut depends on the position alone, so the bits of a row depend neither
on how its prompt was chunked nor on the rows or threads beside it.

Prefetches are spread evenly: the values of a split while its scores are computed, and while its values are summed the
keys that this thread needs next, of the same text or of the one that follows. Where scores take long to become weights,
as with int8 pages, some of both are prefetched then. A core silently drops prefetches that come too fast or while its
miss buffers are full, so all but the first keys of a split are prefetched again shortly before they are scored.
"""

import numpy as np
from numba import types
from numba.core.typing import signature

from . import attention_int8
from .attention_split import STATE, make_split, more_room, padded, padded_rows, room_at
from .jit import kernel
from .kinds import FLOATS, INTEGERS, NUMBER, array, named
from .pages import KV, KV_DTYPES, KV_INT8, NOBODY, SPLIT, SUBPAGE, Query, first_seen
from .simd import splat_f32
from .simd_memory import load_f32, store_f32
from .softmax import ONE, divide_row, merge_row
from .unit import unit


def scratch_size(rows: int, size: int) -> int:
    """float32 numbers that `attend` needs for `rows` rows (tokens x group) of head size `size`."""
    return padded(rows) * (3 * size + SPLIT + 2 * STATE) + SUBPAGE * size


def part_scratch_size(heads: int, group: int, size: int) -> int:
    """float32 numbers that `attend_part` needs for so many kv heads: their queries, and `attend`'s scratch for one."""
    return padded(heads * group) * size + scratch_size(group, size)


def partial_size(size: int) -> int:
    """float32 numbers of one row's unmerged result for one split."""
    return size + 2


@kernel
def _next_keys(query, split, splits, following):
    """(query, position): the keys that follow those of a split, in its own text or in the next one."""
    if split + 1 < splits:
        return query, (split + 1) * SPLIT
    return following, first_seen(following, 0)


def _signatures(kv_format: int, head_unit: int = 16):
    """Those of attend and attend_part."""
    kv, query, place = named(KV, array(KV_DTYPES[kv_format]), FLOATS), named(Query), (FLOATS, NUMBER)
    return (
        signature(types.none, kv, query, INTEGERS, query, *place, NUMBER, *place, NUMBER, *place),
        signature(types.none, kv, query, INTEGERS, NUMBER, NUMBER, NUMBER, *place, *place, *place),
    )


@unit(_signatures)
def make_attention(kv_format: int, head_unit: int = 16):
    """(attend, attend_part) for a pool of this format; merge_parts serves all.

    head_unit: 16 or 64, of which the head size is a multiple; with 64 there is less to compile.
    """
    attend_split, quantized = make_split(kv_format, head_unit), kv_format == KV_INT8

    @kernel
    def load_queries(kv, query, q, q_at, q_stride, scratch, to):
        """Rows of queries, divided by sqrt(size), as score tiles read them."""
        rows, factor = query.tokens * query.group, splat_f32(ONE / np.sqrt(np.float32(kv.size)))
        for r in range(rows):
            at = q_at + r // query.group * q_stride + r % query.group * kv.size
            for d in range(0, kv.size, 16):
                store_f32(scratch, to + r * kv.size + d, load_f32(q, at + d) * factor)
        if quantized:
            attention_int8.widen_queries(kv, rows, scratch, to)

    @kernel
    def attend(kv, query, pages, following, q, q_at, q_stride, out, out_at, out_stride, scratch, scratch_at):
        """out = softmax(q . keys / sqrt(size)) . values, over the positions up to each token's own.

        query: Query; pages: int64 page numbers; q, out: float32, token t at t * stride, its heads side by side;
        scratch: float32, scratch_size(tokens * group, size) numbers from scratch_at; following: the Query that this
        thread serves next, one of 0 tokens if there is none.
        """
        rows = query.tokens * query.group
        room = room_at(kv, rows, scratch, scratch_at + padded_rows(rows) * kv.size)
        more = more_room(kv, rows, room)
        load_queries(kv, query, q, q_at, q_stride, scratch, scratch_at)
        splits = (query.position + query.tokens + SPLIT - 1) // SPLIT
        split0 = first_seen(query, 0) // SPLIT
        then, ahead = _next_keys(query, split0, splits, following)
        attend_split(kv, query, pages, split0, then, ahead, room, scratch_at)
        for split in range(split0 + 1, splits):
            then, ahead = _next_keys(query, split, splits, following)
            attend_split(kv, query, pages, split, then, ahead, more, scratch_at)
            for r in range(rows):
                mine, other = room.state + STATE * r, more.state + STATE * r
                scratch[mine], scratch[mine + 1] = merge_row(
                    scratch,
                    room.sums + r * kv.size,
                    kv.size,
                    scratch[mine],
                    scratch[mine + 1],
                    scratch,
                    more.sums + r * kv.size,
                    scratch[other],
                    scratch[other + 1],
                )
        for r in range(rows):
            to = out_at + r // query.group * out_stride + r % query.group * kv.size
            divide_row(scratch, room.sums + r * kv.size, kv.size, scratch[room.state + STATE * r + 1], out, to)

    @kernel
    def attend_part(kv, query, pages, heads, low, high, q, q_at, parts, parts_at, scratch, scratch_at):
        """A part of `attend` for all kv heads of one token, not merged.

        Items low .. high: (split, head), for the splits of which the token sees something, split by split, so that
        neighbours in memory are neighbours in time. Each item gives `group` rows of size + 2 numbers: sums, maximum and
        total weight. Those of the first head's first split lie at parts_at, its next split's after them, the next
        head's after all splits. query: the first head's; heads: how many; scratch: part_scratch_size(heads,
        group, size) numbers; all else as for `attend`.
        """
        group, splits = query.group, query.position // SPLIT + 1
        room = room_at(kv, group, scratch, scratch_at + padded_rows(heads * group) * kv.size)
        for item in range(low, high):
            split, head = item // heads, item % heads
            mine, row = _of_head(query, head), head * group * kv.size
            # A head's first item; later ones find its queries in scratch.
            if item < low + heads:
                load_queries(kv, mine, q, q_at + row, 0, scratch, scratch_at + row)
            # What follows this thread's last item is another thread's.
            then = _of_head(query, (item + 1) % heads) if item + 1 < high else NOBODY
            ahead = first_seen(then, (item + 1) // heads * SPLIT)
            attend_split(kv, mine, pages, split, then, ahead, room, scratch_at + row)
            to = parts_at + (head * splits + split) * group * (kv.size + 2)
            for r in range(group):
                state = room.state + STATE * r
                for d in range(0, kv.size, 16):
                    store_f32(parts, to + d, load_f32(scratch, room.sums + r * kv.size + d))
                parts[to + kv.size], parts[to + kv.size + 1] = scratch[state], scratch[state + 1]
                to += kv.size + 2

    return attend, attend_part


@kernel
def _of_head(query, head):
    """The same tokens for another head."""
    return Query(query.layer, head, query.group, query.position, query.tokens, query.window, query.pages_at)


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
        maximum, total = merge_row(
            parts, at, size, maximum, total, parts, other, parts[other + size], parts[other + size + 1]
        )
    divide_row(parts, at, size, total, out, out_at)
