"""Attention of a step: tiles of rows, and the long sequences split over the threads."""

from minilora_kernels.attention import merge_parts
from minilora_kernels.batch import (
    LONG_PAGES,
    LONG_PARTS,
    LONG_POSITION,
    LONG_ROW,
    TILE_PAGES,
    TILE_POSITION,
    TILE_ROW,
    TILE_TOKENS,
)
from minilora_kernels.held import by_value
from minilora_kernels.jit import kernel
from minilora_kernels.pages import NOBODY, SPLIT, Query, first_seen
from minilora_kernels.sync import barrier, claim

from ..plan import WINDOW
from .work import share_of


@kernel
def first_item(first, last, heads, thread, threads):
    """The item that thread `thread` begins with; for `threads` the end of all items.

    Items are (split, head), split by split. Each thread gets about as many of the positions first .. last: the splits
    at both ends hold fewer than others.
    """
    if thread == threads:
        return (last + SPLIT - 1) // SPLIT * heads
    at = first + (last - first) * thread // threads
    split = at // SPLIT
    start, end = max(first, split * SPLIT), min(last, (split + 1) * SPLIT)
    return split * heads + ((at - start) * heads + (end - start) // 2) // (end - start)


@kernel
def long_query(c, layer, i, head, group):
    """One kv head of a long token."""
    position, window = c.rows.long[i, LONG_POSITION] + c.turn, c.w.layers[layer, WINDOW]
    return Query(layer, head, group, position, 1, window, c.rows.long[i, LONG_PAGES])


@kernel
def tile_query(c, layer, item, group):
    """One kv head of one tile; NOBODY where there is no such item."""
    tile, head = item // c.shape.kv_heads, item % c.shape.kv_heads
    if tile >= len(c.rows.tiles):
        return NOBODY
    tokens, position = c.rows.tiles[tile, TILE_TOKENS], c.rows.tiles[tile, TILE_POSITION] + c.turn
    window = c.w.layers[layer, WINDOW]
    return Query(layer, head, group, position, tokens, window, c.rows.tiles[tile, TILE_PAGES])


@kernel
def merge_long(c, layer, group):
    """Merge the splits of the long tokens, from the first of which a position is seen."""
    b, heads, size = c.buffers, c.shape.heads, c.shape.head_dim
    low, high = share_of(c, len(c.rows.long) * heads)
    for item in range(low, high):
        i, head = item // heads, item % heads
        query, row = long_query(c, layer, i, head // group, group), c.rows.long[i, LONG_ROW]
        splits, split0 = query.position // SPLIT + 1, first_seen(query, 0) // SPLIT
        part = c.rows.long[i, LONG_PARTS] + (query.head * splits + split0) * group * (size + 2)
        to = row * b.a.stride + head * size
        merge_parts(b.parts, part, splits - split0, group, head % group, size, b.a.values, to)


def make_attend_all(attend, attend_part):
    """The kernel attend_all, from the attention of one tile and of a part of a long token."""

    @kernel
    def attend_all(c, layer):
        """Attention of all heads; results are rows of buffers.a. Ends with a barrier."""
        group = c.shape.heads // c.shape.kv_heads
        for i in range(len(c.rows.long)):
            attend_long(c, layer, i, group)
        attend_tiles(c, layer, group)
        barrier(c.sync, c.threads)
        if len(c.rows.long) > 0:
            merge_long(c, layer, group)
            barrier(c.sync, c.threads)

    @kernel
    def attend_tiles(c, layer, group):
        """Tile by tile, as threads come free; each claims one ahead, to prefetch its keys."""
        kv, b, scratch_at = by_value(c.kv), c.buffers, c.thread * c.buffers.scratch_stride
        item = claim(c.sync)
        query = tile_query(c, layer, item, group)
        while query.tokens > 0:
            following = claim(c.sync)
            then = tile_query(c, layer, following, group)
            row, column = c.rows.tiles[item // c.shape.kv_heads, TILE_ROW], query.head * group * c.shape.head_dim
            attend(
                kv,
                query,
                c.batch.pages,
                then,
                b.qkv,
                row * b.qkv_stride + column,
                b.qkv_stride,
                b.a.values,
                row * b.a.stride + column,
                b.a.stride,
                b.scratch,
                scratch_at,
            )
            item, query = following, then

    @kernel
    def attend_long(c, layer, i, group):
        """This thread's part of one long token."""
        b, heads, query = c.buffers, c.shape.kv_heads, long_query(c, layer, i, 0, group)
        first, last = first_seen(query, 0), query.position + 1
        attend_part(
            by_value(c.kv),
            query,
            c.batch.pages,
            heads,
            first_item(first, last, heads, c.thread, c.threads),
            first_item(first, last, heads, c.thread + 1, c.threads),
            b.qkv,
            c.rows.long[i, LONG_ROW] * b.qkv_stride,
            b.parts,
            c.rows.long[i, LONG_PARTS],
            b.scratch,
            c.thread * b.scratch_stride,
        )

    return attend_all
