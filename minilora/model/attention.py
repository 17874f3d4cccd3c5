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
from minilora_kernels.pages import NOBODY, SPLIT, Query
from minilora_kernels.sync import barrier, claim

from ..plan import WINDOW
from .arrays import share_of


def make_attend_all(attend, attend_part):
    """The kernel attend_all, from the attention of one tile and of one split."""

    @kernel
    def attend_all(c, layer):
        """Attention of all heads; results are rows of buffers.a. Ends with a barrier."""
        group = c.shape.heads // c.shape.kv_heads
        for i in range(len(c.batch.long)):
            attend_long(c, layer, i, group)
        attend_tiles(c, layer, group)
        barrier(c.sync, c.size)
        if len(c.batch.long) > 0:
            merge_long(c, group)
            barrier(c.sync, c.size)

    @kernel
    def tile_query(c, layer, item, group):
        """One kv head of one tile; NOBODY where there is no such item."""
        tile, head = item // c.shape.kv_heads, item % c.shape.kv_heads
        if tile >= len(c.batch.tiles):
            return NOBODY
        tokens, position = c.batch.tiles[tile, TILE_TOKENS], c.batch.tiles[tile, TILE_POSITION] + c.turn
        window = c.w.layers[layer, WINDOW]
        return Query(layer, head, group, position, tokens, window, c.batch.tiles[tile, TILE_PAGES])

    @kernel
    def attend_tiles(c, layer, group):
        """Tile by tile, as threads come free; each takes one ahead, to ask for its keys."""
        kv, batch, b, scratch_at = by_value(c.kv), c.batch, c.buffers, c.rank * c.buffers.scratch_stride
        item, asked = claim(c.sync), 0
        query = tile_query(c, layer, item, group)
        while query.tokens > 0:
            following = claim(c.sync)
            then = tile_query(c, layer, following, group)
            row, column = batch.tiles[item // c.shape.kv_heads, TILE_ROW], query.head * group * c.shape.head_dim
            asked = attend(
                kv,
                query,
                batch.pages,
                asked,
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
        """This thread's part of one long token: split by split, in each all heads, which are neighbours in memory."""
        shape, kv, batch, b = c.shape, by_value(c.kv), c.batch, c.buffers
        row, position = batch.long[i, LONG_ROW], batch.long[i, LONG_POSITION] + c.turn
        splits, heads = position // SPLIT + 1, shape.kv_heads
        window, pages_at, scratch_at = c.w.layers[layer, WINDOW], batch.long[i, LONG_PAGES], c.rank * b.scratch_stride
        low, high = share_of(c, splits * heads)
        asked = 0
        for item in range(low, high):
            split, head = item // heads, item % heads
            query = Query(layer, head, group, position, 1, window, pages_at)
            # What follows this thread's last split is another's.
            then = Query(layer, (item + 1) % heads, group, position, 1, window, pages_at) if item + 1 < high else NOBODY
            asked = attend_part(
                kv,
                query,
                batch.pages,
                split,
                asked,
                then,
                (item + 1) // heads,
                b.qkv,
                row * b.qkv_stride + head * group * shape.head_dim,
                b.qkv_stride,
                b.parts,
                batch.long[i, LONG_PARTS] + (head * splits + split) * group * (shape.head_dim + 2),
                b.scratch,
                scratch_at,
            )

    @kernel
    def merge_long(c, group):
        """Join the splits of the long tokens."""
        batch, b, heads, size = c.batch, c.buffers, c.shape.heads, c.shape.head_dim
        low, high = share_of(c, len(batch.long) * heads)
        for item in range(low, high):
            i, head = item // heads, item % heads
            splits, row = (batch.long[i, LONG_POSITION] + c.turn) // SPLIT + 1, batch.long[i, LONG_ROW]
            part = batch.long[i, LONG_PARTS] + head // group * splits * group * (size + 2)
            merge_parts(b.parts, part, splits, group, head % group, size, b.a.values, row * b.a.stride + head * size)

    return attend_all
