"""The page pool of keys and values: how they lie in memory, and how a token's are written.

Pages as in PagedAttention (Kwon et al. 2023, arXiv:2309.06180). A page holds `page` tokens of one sequence (a multiple
of 32) for every layer and kv head, as subpages of 32 tokens. RUN pages with consecutive numbers are a *run*: in it, for
each layer and head, the keys of all its pages lie together, followed by the values. A sequence that holds whole runs is
read in memory order.

float32, float16: keys [D][32], so that the scores of 16 tokens are one vector and need no horizontal sums; values
[32][D]. int8, with a float32 scale for each token and head: as the byte dot product wants them, keys + 128 in
[D / 4][32][4] and values in [8][D][4], where the four are neighbours in D of keys, neighbouring tokens of values.
"""

from typing import NamedTuple

import numpy as np

from .jit import kernel
from .memory import aligned_zeros
from .simd import inverse, round_i32, splat_f32
from .simd_memory import load_f32, scatter_f16, scatter_f32, scatter_i8, scatter_u8x4, store_f16, store_f32
from .wide import largest

KV_FLOAT32, KV_FLOAT16, KV_INT8 = range(3)
KV_NAMES = ("float32", "float16", "int8")
SUBPAGE = 32
# As many of the smallest pages as hold a split: its keys and its values are then read as one piece of memory.
RUN = 8
# Attention works through a text in splits of so many positions.
SPLIT = 256

KV_DTYPES = {KV_FLOAT32: np.float32, KV_FLOAT16: np.uint16, KV_INT8: np.uint8}

LARGEST_INT8 = np.float32(127)


class KV(NamedTuple):
    """The page pool.

    numbers: flat [runs, layers, heads, keys and values, RUN, page / 32] of subpages; float32, uint16 holding float16,
    or uint8, for values holding int8. scales: float32, flat [runs, layers, heads, keys and values, RUN, page]; int8
    only.
    """

    numbers: np.ndarray
    scales: np.ndarray
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


# A query of no tokens: none follows.
NOBODY = Query(0, 0, 1, 0, 0, 0, 0)


class Cursor(NamedTuple):
    """A place in a text that is read subpage by subpage.

    position: the subpage's first; page: which of the text's pages it is in; slot: its first token there; column: how
    many of its columns are done.
    """

    position: int
    page: int
    slot: int
    column: int


def empty_pool(kv_format: int, pages: int, layers: int, heads: int, size: int, page: int) -> KV:
    """At least `pages` pages of `page` tokens; memory that is never written is never taken from the system."""
    tokens = -(-pages // RUN) * layers * heads * 2 * RUN * page
    scales = aligned_zeros(tokens if kv_format == KV_INT8 else 1, np.float32)
    return KV(aligned_zeros(tokens * size, KV_DTYPES[kv_format]), scales, layers, heads, size, page)


def token_bytes(kv_format: int, size: int) -> int:
    """Bytes of the key or the value of a token in one kv head, its scale included."""
    return size * np.dtype(KV_DTYPES[kv_format]).itemsize + (4 if kv_format == KV_INT8 else 0)


@kernel
def first_token(kv, layer, page, head):
    """Where the keys of one kv head of this page begin, counted in tokens."""
    run = (page // RUN * kv.layers + layer) * kv.heads + head
    return (run * 2 * RUN + page % RUN) * kv.page


@kernel
def values_behind(kv):
    """How far after a token's key its value lies, counted in tokens."""
    return RUN * kv.page


@kernel
def cursor_at(kv, position):
    """The cursor at the subpage that begins with this position."""
    page = position // kv.page
    return Cursor(position, page, position - page * kv.page, 0)


@kernel
def advance(kv, cursor, columns):
    """The cursor so many columns on, kv.size at most. No divisions: they would cost more than all else here."""
    position, page, slot, column = cursor
    column += columns
    if column < kv.size:
        return Cursor(position, page, slot, column)
    position, slot, column = position + SUBPAGE, slot + SUBPAGE, column - kv.size
    return Cursor(position, page, slot, column) if slot < kv.page else Cursor(position, page + 1, 0, column)


@kernel
def token_at(kv, query, pages, cursor):
    """Where the first key of the cursor's subpage lies, counted in tokens."""
    return first_token(kv, query.layer, pages[query.pages_at + cursor.page], query.head) + cursor.slot


@kernel
def first_seen(query, start):
    """Where the first subpage from `start` on begins that any row of the query sees; `start` if there is no window."""
    if query.window == 0:
        return start
    return max(start, (query.position - query.window + 1) // SUBPAGE * SUBPAGE)


def make_write(kv_format: int):
    """(write_key, write_value) for a pool of this format."""
    quantized = kv_format == KV_INT8
    scatter, store = {KV_FLOAT16: (scatter_f16, store_f16)}.get(kv_format, (scatter_f32, store_f32))

    @kernel
    def write_key(kv, layer, page, slot, head, x, at):
        """Store a token's key of one kv head: x[at : at + size], float32, as token `slot` of the page."""
        token = first_token(kv, layer, page, head) + slot
        first, place = token // SUBPAGE * SUBPAGE * kv.size, token % SUBPAGE
        if quantized:
            scale = largest(x, at, kv.size) / LARGEST_INT8
            kv.scales[token] = scale
            factor = inverse(splat_f32(scale))
        for d in range(0, kv.size, 16):
            v = load_f32(x, at + d)
            if quantized:
                scatter_u8x4(kv.numbers, first + d * SUBPAGE + 4 * place, 4 * SUBPAGE, round_i32(v * factor))
            else:
                scatter(kv.numbers, first + d * SUBPAGE + place, SUBPAGE, v)

    @kernel
    def write_value(kv, layer, page, slot, head, x, at):
        """Store a token's value of one kv head: x[at : at + size], float32, as token `slot` of the page."""
        token = first_token(kv, layer, page, head) + values_behind(kv) + slot
        if quantized:
            scale = largest(x, at, kv.size) / LARGEST_INT8
            kv.scales[token] = scale
            factor, first = inverse(splat_f32(scale)), token // 4 * 4 * kv.size + token % 4
        for d in range(0, kv.size, 16):
            v = load_f32(x, at + d)
            if quantized:
                scatter_i8(kv.numbers, first + 4 * d, 4, round_i32(v * factor))
            else:
                store(kv.numbers, token * kv.size + d, v)

    return write_key, write_value
