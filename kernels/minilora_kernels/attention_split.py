"""One split of attention, for all rows: scores, softmax, weighted sum of values; see `attention`."""

from typing import NamedTuple

import numpy as np

from . import attention_float, attention_int8, cpu
from .attention_float import AT_ONCE, MOST_ROWS, VALUE_ROWS
from .attention_span import Span, prefetch_scales, value_at
from .jit import kernel
from .pages import KV_FLOAT16, KV_INT8, SPLIT, SUBPAGE, advance, cursor_at, first_seen, token_at
from .prefetching import no_prefetch
from .softmax import make_weigh_row, mask_row

# From so many rows on it pays to widen float16 keys once for all of them.
MANY = 12 if cpu.vectors() >= 32 else 5
# How many positions ahead of being scored keys are prefetched, again or for the first time.
AHEAD = 4 * SUBPAGE
# Numbers of a row's state, see Room.
STATE = 3


class Room(NamedTuple):
    """Where in scratch a split of some rows keeps what it computes.

    loaded: shared by all rows: a subpage's keys, widened to float32, or the scales of int8 values; weights: SPLIT
    scores of each row, then weights; sums: of values, `size` of each row; state: of each row the maximum and the two
    numbers that weigh_row returns.
    """

    scratch: np.ndarray
    loaded: int
    weights: int
    sums: int
    state: int


def padded(rows):
    """Rows, rounded up to whole tiles."""
    return (rows + MOST_ROWS - 1) // MOST_ROWS * MOST_ROWS


padded_rows = kernel(padded)


@kernel
def room_at(kv, rows, scratch, at):
    """Room for so many rows, from `at` on; after its sums there is space for those of more_room."""
    weights = at + SUBPAGE * kv.size
    sums = weights + padded_rows(rows) * SPLIT
    return Room(scratch, at, weights, sums, sums + 2 * padded_rows(rows) * kv.size)


@kernel
def more_room(kv, rows, room):
    """The same, but with sums and state of its own, after the other's."""
    padded = padded_rows(rows)
    return Room(room.scratch, room.loaded, room.weights, room.sums + padded * kv.size, room.state + padded * STATE)


# ---------------------------------------------------------------- all rows, tile by tile


def _in_tiles(tile, most=MOST_ROWS):
    """All rows: in tiles of `most` and one of what is left. Only the first tile prefetches.

    part: what the tile is about, see score_tile and value_tile. source, target: where in scratch the first row's
    queries and scores lie, or its weights and sums; those of the next row lie step and target_step further on.
    """

    @kernel
    def tiles(kv, part, rows, scratch, source, step, target, target_step):
        r = 0
        if rows >= most:
            tile(most, kv, part, True, scratch, source, target)
            r = most
        while rows - r >= most:
            tile(most, kv, part, False, scratch, source + r * step, target + r * target_step)
            r += most
        source, target, prefetches = source + r * step, target + r * target_step, r == 0
        if most > 3 and rows - r == 3:
            tile(3, kv, part, prefetches, scratch, source, target)
        elif most > 2 and rows - r == 2:
            tile(2, kv, part, prefetches, scratch, source, target)
        elif rows - r == 1:
            tile(1, kv, part, prefetches, scratch, source, target)

    return tiles


def _make_score_subpage(kv_format):
    if kv_format == KV_INT8:
        tiles = _in_tiles(attention_int8.score_tile)
    else:
        tiles = _in_tiles(attention_float.score_tile(kv_format))
    many = attention_float.many_scores(kv_format) if kv_format == KV_FLOAT16 else None

    @kernel
    def score_subpage(kv, token, values, keys, rows, room, q_at, scores_at):
        """All rows against one subpage; values and keys from these places on are prefetched, see score_tile."""
        if many is not None and rows >= MANY:
            many(kv, token, values, keys, rows, room.scratch, q_at, room.loaded, scores_at)
            return
        tiles(kv, (token, values, keys), rows, room.scratch, q_at, kv.size, scores_at, SPLIT)

    return score_subpage


def _make_sum_values(kv_format, head_unit):
    # Integers need two sums for each number, or, as pairs of 16 bits, both bytes of each widened.
    width, most = (AT_ONCE, MOST_ROWS) if kv_format == KV_INT8 else (2 * AT_ONCE, VALUE_ROWS)

    def for_width(width):
        if kv_format == KV_INT8:
            return _in_tiles(attention_int8.value_tile(width), most)
        return _in_tiles(attention_float.value_tile(width, kv_format), most)

    wide, columns = for_width(width), 16 * width
    narrow = for_width(1) if head_unit % columns else None

    @kernel
    def sum_values(kv, span, rows, room):
        """All rows, all columns: 16 * width at a time, the rest 16 at a time; the next keys are prefetched."""
        whole = kv.size // columns * columns
        for d in range(0, whole, columns):
            wide(kv, (span, d), rows, room.scratch, room.weights, SPLIT, room.sums, kv.size)
        if narrow is not None:
            for d in range(whole, kv.size, 16):
                narrow(kv, (span, d), rows, room.scratch, room.weights, SPLIT, room.sums, kv.size)

    return sum_values


@kernel
def _seen(query, r, start, end):
    """(first, end) of the positions start .. end that row r sees, counted from start."""
    own = query.position + r // query.group
    first = max(start, own - query.window + 1) if query.window > 0 else start
    return first - start, min(own + 1, end) - start


@kernel
def widen_weights(kv, span, rows, room, first, end):
    """Weights of lanes first .. end to wide integers, after all rows are weighed: none waits for its largest."""
    for r in range(rows):
        most, prefetch = room.scratch[room.state + STATE * r + 2], attention_int8.first_keys(kv, span, rows, r)
        attention_int8.widen_weights(room.scratch, room.weights + r * SPLIT, first, end, most, prefetch)


def make_split(kv_format, head_unit):
    """The kernel attend_split for a pool of this format; head_unit as in make_attention."""
    quantized = kv_format == KV_INT8
    score_subpage, weigh_row, sum_values = (
        _make_score_subpage(kv_format),
        make_weigh_row(quantized),
        _make_sum_values(kv_format, head_unit),
    )

    @kernel
    def score_split(kv, span, rows, room, q_at):
        """Scores of all rows."""
        query, start = span.query, span.first // SPLIT * SPLIT
        cursor, ahead = cursor_at(kv, span.first), cursor_at(kv, span.first + AHEAD)
        asked = cursor
        for p in range(span.first, span.end, SUBPAGE):
            token, keys = token_at(kv, query, span.pages, cursor), -1
            if ahead.position < span.end:
                keys = prefetch_place(kv, token_at(kv, query, span.pages, ahead))
            values = prefetch_place(kv, value_at(kv, span, asked)) + asked.column * SUBPAGE
            score_subpage(kv, token, values, keys, rows, room, q_at, room.weights + p - start)
            cursor, ahead = advance(kv, cursor, kv.size), advance(kv, ahead, kv.size)
            asked = advance(kv, asked, attention_int8.beside(rows, kv.size) if quantized else kv.size)

    @kernel
    def prefetch_place(kv, token):
        """Where in kv.numbers a token lies whose subpage is prefetched; its scales are prefetched at once."""
        if quantized:
            prefetch_scales(kv, token)
        return token * kv.size

    @kernel
    def weigh(kv, span, rows, room):
        """Turn scores into weights, as value tiles read them. State: each row's maximum and total weight."""
        start, state, scratch = span.first // SPLIT * SPLIT, room.state, room.scratch
        first, end = span.first - start, (span.end - start + 15) // 16 * 16
        for r in range(rows):
            low, high = _seen(span.query, r, start, span.end)
            scratch[state + STATE * r] = mask_row(scratch, room.weights + r * SPLIT, low, high, first, end)
        if quantized:
            attention_int8.load_scales(kv, span, scratch, room.loaded)
        for r in range(rows):
            at, row, scales = state + STATE * r, room.weights + r * SPLIT, room.loaded - first
            prefetch = attention_int8.late_values(kv, span, rows, r) if quantized else no_prefetch(kv.numbers)
            scratch[at + 1], scratch[at + 2] = weigh_row(scratch, row, first, end, scratch[at], scales, prefetch)
        if quantized:
            widen_weights(kv, span, rows, room, first, end)

    @kernel
    def attend_split(kv, query, pages, split, following, ahead, room, q_at):
        """One split, of which some row sees a position: sums of values and, in state, maxima and total weights of rows.

        ahead: the position in `following` from which on keys are needed next.
        """
        rows, start = query.tokens * query.group, split * SPLIT
        end = min(start + SPLIT, query.position + query.tokens)
        span = Span(query, pages, first_seen(query, start), end, following, ahead)
        score_split(kv, span, rows, room, q_at)
        weigh(kv, span, rows, room)
        sum_values(kv, span, rows, room)

    return attend_split
