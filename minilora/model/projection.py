"""Queries, keys and values: q k v of all rows, rotated, keys and values in their pages."""

from minilora_kernels.jit import kernel
from minilora_kernels.lora_expand import Place
from minilora_kernels.pack import BLOCK, PANEL, ROWS
from minilora_kernels.pointwise import add_row, rms_norm, rope
from minilora_kernels.sync import barrier, share

from ..adapters import Q_OUT
from ..plan import K_NORM, Q_NORM, QKV, QKV_BIAS, QKV_PARTS, ROTARY
from .work import TILE_ROWS, bytes_of, first_piece, is_helped, next_piece, rows_at_once, share_of, span_of, work_of

# From so many rows per thread on they share q k v by rows: reading all weights then takes little.
ROWS_EACH = 32
# How many items each thread then gets, unless they would have fewer than TILE_ROWS rows.
ITEMS_EACH = 8


def make_projection(product, expand_all, write_key, write_value):
    """The kernel project_heads."""

    @kernel
    def multiply(c, layer, x_row, rows, block0, block1, at):
        """Blocks block0 .. block1 of q k v, which are stored as one to three matrices."""
        w, b, start = c.w, c.buffers, 0
        for part in range(w.layers[layer, QKV_PARTS]):
            matrix = w.layers[layer, QKV] + part
            end = start + w.matrices[matrix, ROWS] // BLOCK
            low, high = max(block0, start), min(block1, end)
            if low < high:
                to, first, last = at + (low - block0) * BLOCK, low - start, high - start
                product(c, matrix, b.a, x_row, rows, first, last, b.qkv, to, b.qkv_stride, 0)
            start = end

    @kernel
    def adapt(c, layer, row0, row1, head0, head1):
        """Add the adapters' parts of heads head0 .. head1: queries, then keys, then values."""
        shape, b, start = c.shape, c.buffers, 0
        first, end = head0 * shape.head_dim // PANEL, head1 * shape.head_dim // PANEL
        for which in range(3):
            panels = (shape.heads if which == Q_OUT else shape.kv_heads) * shape.head_dim // PANEL
            to = Place(b.qkv, row0 * b.qkv_stride + start * PANEL, b.qkv_stride, PANEL)
            low, high = max(first - start, 0), min(end - start, panels)
            expand_all(c, layer, which, row0, row1, low, high, to, min(which + 1, 2), 0)
            start += panels

    @kernel
    def finish_head(c, layer, row, head):
        """Bias, norm and rotation of one head; keys and values go to their page. Heads: q, then k, then v."""
        w, shape, kv, x = c.w, c.shape, c.kv, c.buffers.qkv
        key, value = head - shape.heads, head - shape.heads - shape.kv_heads
        column, position = head * shape.head_dim, c.rows.positions[row] + c.turn
        at = row * c.buffers.qkv_stride + column
        page, slot = c.batch.pages[c.rows.pages_at[row] + position // kv.page], position % kv.page
        if w.layers[layer, QKV_BIAS] >= 0:
            add_row(x, at, w.arena, w.layers[layer, QKV_BIAS] + 4 * column, shape.head_dim)
        if value >= 0:
            write_value(kv, layer, page, slot, value, x, at)
            return
        norm = w.layers[layer, Q_NORM] if key < 0 else w.layers[layer, K_NORM]
        if norm >= 0:
            rms_norm(x, at, shape.head_dim, w.arena, norm, shape.eps, x, at)
        if w.layers[layer, ROTARY] == 1:
            rope(x, at, w.half, w.cos, w.sin, position * w.half)
        if key >= 0:
            write_key(kv, layer, page, slot, key, x, at)

    @kernel
    def project_some(c, layer, x_row, row, rows, head0, head1):
        """q k v of some rows and some heads, ready for attention."""
        size = c.shape.head_dim
        block0, block1 = head0 * size // BLOCK, (head1 * size + BLOCK - 1) // BLOCK
        multiply(c, layer, x_row + row, rows, block0, block1, row * c.buffers.qkv_stride + block0 * BLOCK)
        adapt(c, layer, row, row + rows, head0, head1)
        for r in range(row, row + rows):
            for head in range(head0, head1):
                finish_head(c, layer, r, head)

    @kernel
    def project_heads(c, layer, x_row, first):
        """q k v of the heads from `first` on, 0 or the first of the keys, ready for attention. Ends with a barrier."""
        w, count, size = c.w, len(c.rows.tokens), 0
        for part in range(w.layers[layer, QKV_PARTS]):
            size += bytes_of(c, w.layers[layer, QKV] + part, count)
        if count >= ROWS_EACH * c.threads:
            by_rows(c, layer, x_row, first, size)
        elif is_helped(c, size) or count == 1 or c.shape.head_dim % BLOCK > 0:
            by_pairs(c, layer, x_row, first, size)
        else:
            by_kinds(c, layer, x_row, first)
        barrier(c.sync, c.threads)

    @kernel
    def by_rows(c, layer, x_row, first, size):
        """Threads take rows, multiples of TILE_ROWS, with all heads: so many that reading all weights takes little."""
        shape, count, step = c.shape, len(c.rows.tokens), rows_at_once(c.shape.width)
        height = min(step, TILE_ROWS * max(1, count // (TILE_ROWS * ITEMS_EACH * c.threads)))
        work = work_of(c, 1, count, height, size, 1)
        at, end = first_piece(c, work)
        while at < end:
            row = at * height
            rows = min(step // height * height, end * height - row, count - row)
            project_some(c, layer, x_row, row, rows, first, shape.heads + 2 * shape.kv_heads)
            at, end = next_piece(c, work, at + (rows + height - 1) // height, end)

    @kernel
    def by_pairs(c, layer, x_row, first, size):
        """Threads take pairs of heads, of which two may share a block; weights are read in one piece."""
        heads, pair0 = c.shape.heads + 2 * c.shape.kv_heads, first // 2
        work = work_of(c, (heads + 1) // 2 - pair0, len(c.rows.tokens), rows_at_once(c.shape.width), size, 1)
        at, end = first_piece(c, work)
        while at < end:
            row, rows, low, high = span_of(work, at, end)
            project_some(c, layer, x_row, row, rows, 2 * (pair0 + low), min(2 * (pair0 + high), heads))
            at, end = next_piece(c, work, at + high - low, end)

    @kernel
    def by_kinds(c, layer, x_row, first):
        """Each kind of head is shared out by itself: keys take longest to write; those with more queries get fewer."""
        shape, count, step = c.shape, len(c.rows.tokens), rows_at_once(c.shape.width)
        keys, values = shape.heads, shape.heads + shape.kv_heads
        for row in range(0, count, step):
            rows = min(step, count - row)
            low, high = share_of(c, shape.heads - first)
            project_some(c, layer, x_row, row, rows, low, high)
            low, high = share(shape.kv_heads, c.threads - 1 - c.thread, c.threads)
            project_some(c, layer, x_row, row, rows, keys + low, keys + high)
            low, high = share_of(c, shape.kv_heads)
            project_some(c, layer, x_row, row, rows, values + low, values + high)

    return project_heads
