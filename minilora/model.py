"""The forward step of a Llama-family decoder: one compiled function that every thread of the team runs.

A step takes T rows: any mix of prefill chunks and decodes of B sequences, with any adapters. Each phase splits
its work over the threads; a barrier ends it:

    embed | norm, q k v, rotate, write pages | attend | o | norm, gate up, silu | down | ... | norm, head

For up to FEW rows every thread normalises and quantises all of them itself, which costs less than a barrier.
With adapters, `shrink` and a barrier come before each product. A step may go on in further rounds, each with the
tokens that the one before chose. Whatever the batch and the team, each number is computed by the same operations in
the same order.

Products, attention, adapters' tiles and sampling are units of their own, see minilora_kernels.unit: compiled beside the rest.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from minilora_kernels.attention import make_attention, merge_parts
from minilora_kernels.batch import (
    CHOICE_ROW,
    LONG_PAGES,
    LONG_PARTS,
    LONG_POSITION,
    LONG_ROW,
    SAMPLING,
    TILE_PAGES,
    TILE_POSITION,
    TILE_ROW,
    TILE_TOKENS,
    StepInput,
    all_ended,
    choose,
    rounds_of,
    token_at,
    unpack,
)
from minilora_kernels.held import by_value, hold
from minilora_kernels.jit import kernel
from minilora_kernels.linear import Rows, make_linear
from minilora_kernels.lora import make_lora
from minilora_kernels.lora_pack import head_bytes, number_bytes
from minilora_kernels.pack import BLOCK, COLUMNS, GROUP, PANEL, ROWS
from minilora_kernels.pages import KV, NOBODY, SPLIT, Query, make_write
from minilora_kernels.pointwise import add_row, embed, quantize_row, rms_norm, rope, silu_mul
from minilora_kernels.sample import argmax
from minilora_kernels.sync import barrier, claim, share
from minilora_kernels.team import team_program

from .adapters import DOWN_IN, DOWN_OUT, GATE_OUT, GATE_UP_IN, O_IN, O_OUT, Q_OUT, QKV_IN, UP_OUT, AdapterArrays
from .weights import (
    DOWN,
    DOWN_BIAS,
    GATE_UP,
    GATE_UP_BIAS,
    INPUT_NORM,
    K_NORM,
    O_BIAS,
    POST_NORM,
    Q_NORM,
    QKV,
    QKV_BIAS,
    QKV_PARTS,
    ROTARY,
    WINDOW,
    Network,
    O,
)

FEW = 8
CHUNK_BLOCKS = 8
MOST_ROWS = 256
# From how many rows for each thread on q k v are shared by rows: reading the weights takes little beside them.
ROWS_EACH = 32
CACHE_BYTES = 256 * 1024


class Shape(NamedTuple):
    """Sizes of the model, see README's table of names; eps of the norms."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    forward: int
    vocabulary: int
    eps: np.float32


class Buffers(NamedTuple):
    """Scratch of the step, float32, allocated once.

    x: [T, width], the residual stream; a: inputs of q k v, o and gate up; b: inputs of down; qkv: [T, qkv];
    s: [T, s_stride], shrunk rows, of int8 adapters as wide integers; scratch: scratch_stride numbers for each thread;
    parts: unmerged attention; logits: [rows, vocabulary padded to 32]; bests: [rows, threads], where the largest of each
    thread's columns is; chances, ids: a row of logits for each thread. shared: T at most; from that row of `a` on, FEW rows
    for each thread.
    """

    x: np.ndarray
    a: Rows
    b: Rows
    qkv: np.ndarray
    qkv_stride: int
    s: np.ndarray
    s_stride: int
    scratch: np.ndarray
    scratch_stride: int
    parts: np.ndarray
    logits: np.ndarray
    bests: np.ndarray
    chances: np.ndarray
    ids: np.ndarray
    shared: int


class Fixed(NamedTuple):
    """What all steps share."""

    w: Network
    shape: Shape
    kv: KV
    adapters: AdapterArrays
    buffers: Buffers


class Context(NamedTuple):
    """What every phase of a step sees: the thread's number, the team's size and barrier, the round, and all arrays.

    Kernels get it by address, see `hold`.
    """

    rank: int
    size: int
    sync: np.ndarray
    turn: int
    w: Network
    shape: Shape
    kv: KV
    batch: StepInput
    adapters: AdapterArrays
    buffers: Buffers


@kernel
def _share(c, total):
    """(first, end) of this thread's part of range(total)."""
    return share(total, c.rank, c.size)


@kernel
def _rows_at_once(columns):
    """Rows whose int8 inputs stay in the second-level cache beside the weights of a chunk."""
    return min(MOST_ROWS, max(8, CACHE_BYTES // columns // 8 * 8))


# ---------------------------------------------------------------- inputs of the products


@kernel
def _place_of_values(c, group, segments, rows, at, scratch_at):
    """(array, at): where a row's floats go: rows.values[at] if adapters, or weights that are floats, read them there.

    If they are only to be quantised they stay in scratch, in the nearest cache.
    """
    if group == 0 or len(segments) > 0:
        return rows.values, at
    return c.buffers.scratch, scratch_at


@kernel
def _norm_row(c, norm_at, group, segments, x_row, row):
    """Row x_row of the stream, normalised and quantised: row `row` of buffers.a."""
    a, width = c.buffers.a, c.shape.width
    values, at = _place_of_values(c, group, segments, a, row * a.stride, c.rank * c.buffers.scratch_stride)
    rms_norm(c.buffers.x, x_row * width, width, c.w.arena, norm_at, c.shape.eps, values, at)
    if group > 0:
        quantize_row(values, at, width, group, a, row, 0)


@kernel
def _norm(c, norm_at, group):
    """All rows of the stream, normalised and quantised; returns the row of buffers.a where this thread finds the first."""
    count = len(c.batch.tokens)
    if count <= FEW:
        first = c.buffers.shared + c.rank * FEW
        for r in range(count):
            _norm_row(c, norm_at, group, c.batch.segments, r, first + r)
        return first
    low, high = _share(c, count)
    for r in range(low, high):
        _norm_row(c, norm_at, group, c.batch.segments, r, r)
    barrier(c.sync, c.size)
    return 0


@kernel
def _quantize_attended(c, group):
    """Quantise what attention left in the rows of buffers.a; returns as _norm does."""
    count, a, columns = len(c.batch.tokens), c.buffers.a, c.shape.heads * c.shape.head_dim
    if group == 0:
        return 0
    if count <= FEW:
        first = c.buffers.shared + c.rank * FEW
        for r in range(count):
            quantize_row(a.values, r * a.stride, columns, group, a, first + r, 0)
        return first
    low, high = _share(c, count)
    for r in range(low, high):
        quantize_row(a.values, r * a.stride, columns, group, a, r, 0)
    barrier(c.sync, c.size)
    return 0


# ---------------------------------------------------------------- adapters


class Place(NamedTuple):
    """Where a product's rows lie: row `row` at `at`, the next one `stride` on, and panels `step` apart."""

    array: np.ndarray
    at: int
    stride: int
    step: int


def _make_adapters(lora_format, shrink, gather, expand):
    head, size = head_bytes(lora_format), PANEL * number_bytes(lora_format)

    @kernel
    def shrink_all(c, segments, scales, layer, which, columns, x, x_row):
        """s = scale * x A of every segment, for the matrices that read input `which`. Ends with a barrier.

        A unit of work is one panel and up to 32 rows; neighbouring units read neighbouring bytes.
        """
        inputs, b, arena, units = c.adapters.inputs, c.buffers, c.adapters.arena, 0
        for i in range(len(segments)):
            pieces = (segments[i, 1] - segments[i, 0] + BLOCK - 1) // BLOCK
            units += pieces * (inputs[segments[i, 2], layer, which, 1] // PANEL)
        low, high = _share(c, units)
        unit = 0
        for i in range(len(segments)):
            first, end, slot = segments[i, 0], segments[i, 1], segments[i, 2]
            at, panels = inputs[slot, layer, which, 0], inputs[slot, layer, which, 1] // PANEL
            then, scale = inputs[segments[min(i + 1, len(segments) - 1), 2], layer, which, 0], scales[i]
            for panel in range(panels):
                following = then if panel + 1 == panels else at + (panel + 1) * (head + columns * size)
                for row in range(first, end, BLOCK):
                    if low <= unit < high:
                        x_at, to = (x_row + row) * x.stride, row * b.s_stride + segments[i, 3]
                        # What follows this thread's last unit is another's: it asks for what it has.
                        rows, ahead = min(BLOCK, end - row), following if unit + 1 < high else at
                        shrink(
                            arena, at, ahead, columns, panel, x.values, x_at, x.stride, rows, scale, b.s, to, b.s_stride
                        )
                    unit += 1
        barrier(c.sync, c.size)

    @kernel
    def expand_all(c, segments, layer, which, row0, row1, low, high, to, next_which, next_low):
        """Add s B of matrix `which` to rows row0 .. row1, panels low .. high; to: Place of row row0, panel 0.

        next_which, next_low: the matrix and the panel that follow after the last segment, for prefetching.
        """
        outputs, b, arena, last = c.adapters.outputs, c.buffers, c.adapters.arena, len(segments) - 1
        for i in range(len(segments) if low < high else 0):
            first, end, slot = max(row0, segments[i, 0]), min(row1, segments[i, 1]), segments[i, 2]
            at, ranks = outputs[slot, layer, which, 0], outputs[slot, layer, which, 1]
            if ranks > 0 and first < end:
                s_at, column = first * b.s_stride + segments[i, 3], outputs[slot, layer, which, 2]
                out_at = to.at + (first - row0) * to.stride + low * to.step
                then, matrix, panel = segments[min(i + 1, last), 2], which, low
                if i == last:
                    then, matrix, panel = segments[0, 2], next_which, next_low
                following = outputs[then, layer, matrix, 0] + panel * (head + outputs[then, layer, matrix, 1] * size)
                count = end - first
                expand(
                    arena,
                    at,
                    ranks,
                    low,
                    high,
                    following,
                    b.s,
                    s_at,
                    column,
                    b.s_stride,
                    count,
                    to.array,
                    out_at,
                    to.stride,
                    to.step,
                )

    @kernel
    def embed_rows(c):
        """x = the rows of the input embedding, with the adapters' parts. Ends with a barrier."""
        batch, b, width = c.batch, c.buffers, c.shape.width
        low, high = _share(c, len(batch.tokens))
        for r in range(low, high):
            embed(c.w.arena, c.w.matrices, c.w.embed, token_at(batch, c.turn, r), b.x, r * width)
        for i in range(len(batch.segments)):
            slot, arena = batch.segments[i, 2], c.adapters.arena
            a_at, b_at, ranks = c.adapters.embed[slot, 0], c.adapters.embed[slot, 1], c.adapters.embed[slot, 2]
            panels = (ranks + PANEL - 1) // PANEL
            first, end = max(low, batch.segments[i, 0]), min(high, batch.segments[i, 1])
            for r in range(first, end if ranks > 0 else first):
                s_at = r * b.s_stride + batch.segments[i, 3]
                token = token_at(batch, c.turn, r)
                gather(arena, a_at, c.shape.vocabulary, panels, token, batch.scales[i], b.s, s_at)
                expand(arena, b_at, ranks, 0, width // PANEL, b_at, b.s, s_at, 0, 0, 1, b.x, r * width, 0, PANEL)
        barrier(c.sync, c.size)

    return shrink_all, expand_all, embed_rows


# ---------------------------------------------------------------- attention


def _make_projection(linear, expand_all, write_key, write_value):
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
                linear(w.arena, w.matrices, matrix, b.a, x_row, rows, first, last, b.qkv, to, b.qkv_stride, 0)
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
            expand_all(c, c.batch.segments, layer, which, row0, row1, low, high, to, min(which + 1, 2), 0)
            start += panels

    @kernel
    def finish(c, layer, row, head):
        """Bias, norm and rotation of one head; keys and values go to their page. Heads: q, then k, then v."""
        w, shape, kv, x = c.w, c.shape, c.kv, c.buffers.qkv
        key, value = head - shape.heads, head - shape.heads - shape.kv_heads
        column, position = head * shape.head_dim, c.batch.positions[row] + c.turn
        at = row * c.buffers.qkv_stride + column
        page, slot = c.batch.pages[c.batch.pages_at[row] + position // kv.page], position % kv.page
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
                finish(c, layer, r, head)

    @kernel
    def project_heads(c, layer, x_row):
        """q k v, ready for attention. Ends with a barrier. Many rows are shared by rows, few by heads."""
        shape, count, step = c.shape, len(c.batch.tokens), _rows_at_once(c.shape.width)
        if count >= ROWS_EACH * c.size:
            # Whole tiles of 8 rows.
            low, high = _share(c, (count + FEW - 1) // FEW)
            end = min(high * FEW, count)
            for row in range(low * FEW, end, step):
                project_some(c, layer, x_row, row, min(step, end - row), 0, shape.heads + 2 * shape.kv_heads)
        else:
            for row in range(0, count, step):
                project_mine(c, layer, x_row, row, min(step, count - row))
        barrier(c.sync, c.size)

    @kernel
    def project_mine(c, layer, x_row, row, rows):
        """q k v of this thread's heads.

        Each kind of head is shared by itself: keys take longest to write, and those who have more queries get fewer of them.
        For a single row they take little, and weights are better read in one piece.
        """
        shape = c.shape
        keys, values = shape.heads, shape.heads + shape.kv_heads
        if shape.head_dim % BLOCK == 0 and len(c.batch.tokens) > 1:
            low, high = _share(c, shape.heads)
            project_some(c, layer, x_row, row, rows, low, high)
            low, high = share(shape.kv_heads, c.size - 1 - c.rank, c.size)
            project_some(c, layer, x_row, row, rows, keys + low, keys + high)
            low, high = _share(c, shape.kv_heads)
            project_some(c, layer, x_row, row, rows, values + low, values + high)
        else:
            # Two heads may share a block: pairs of them stay together.
            low, high = _share(c, (values + shape.kv_heads + 1) // 2)
            project_some(c, layer, x_row, row, rows, 2 * low, min(2 * high, values + shape.kv_heads))

    return project_heads


def _make_attention(attend, attend_part):
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
        low, high = _share(c, splits * heads)
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
        low, high = _share(c, len(batch.long) * heads)
        for item in range(low, high):
            i, head = item // heads, item % heads
            splits, row = (batch.long[i, LONG_POSITION] + c.turn) // SPLIT + 1, batch.long[i, LONG_ROW]
            part = batch.long[i, LONG_PARTS] + head // group * splits * group * (size + 2)
            merge_parts(b.parts, part, splits, group, head % group, size, b.a.values, row * b.a.stride + head * size)

    return attend_all


# ---------------------------------------------------------------- back into the stream


def _make_output(linear, shrink_all, expand_all):
    @kernel
    def add_product(c, layer, matrix, bias, which_in, which_out, x, x_row, values_row):
        """x += this thread's columns of o or down, with bias and adapters. Ends with a barrier.

        x_row: first of the quantised rows of `x`; values_row: of the float ones, which adapters read.
        """
        w, b, batch, width, count = c.w, c.buffers, c.batch, c.shape.width, len(c.batch.tokens)
        columns = w.matrices[matrix, COLUMNS]
        if len(batch.segments) > 0:
            shrink_all(c, batch.segments, batch.scales, layer, which_in, columns, x, values_row)
        block0, block1 = _share(c, width // BLOCK)
        column, step = block0 * BLOCK, _rows_at_once(columns)
        for row in range(0, count, step):
            rows, at = min(step, count - row), row * width
            linear(w.arena, w.matrices, matrix, x, x_row + row, rows, block0, block1, b.x, at + column, width, 1)
            to, low, high = Place(b.x, at, width, PANEL), 2 * block0, 2 * block1
            expand_all(c, batch.segments, layer, which_out, row, row + rows, low, high, to, which_out, low)
            for r in range(rows if bias >= 0 else 0):
                add_row(b.x, at + r * width + column, w.arena, bias + 4 * column, (block1 - block0) * BLOCK)
        barrier(c.sync, c.size)

    return add_product


def _make_gate_up(linear, expand_all):
    @kernel
    def finish(c, layer, group, row, rows, block, end):
        """silu(gate) * up of a chunk in scratch, quantised: columns of buffers.b."""
        b, count, stride = c.buffers, end - block, CHUNK_BLOCKS * BLOCK
        at, bias = c.rank * b.scratch_stride, c.w.layers[layer, GATE_UP_BIAS]
        for r in range(row, row + rows):
            values, to = _place_of_values(c, group, c.batch.segments, b.b, r * b.b.stride + block * PANEL, at)
            if bias >= 0:
                add_row(b.scratch, at, c.w.arena, bias + 4 * block * BLOCK, count * BLOCK)
            silu_mul(b.scratch, at, count, values, to)
            if group > 0:
                quantize_row(values, to, count * PANEL, group, b.b, r, block * PANEL)
            at += stride

    @kernel
    def gate_up(c, layer, x_row):
        """silu(gate) * up for this thread's columns. Ends with a barrier."""
        w, b, count = c.w, c.buffers, len(c.batch.tokens)
        matrix, group = w.layers[layer, GATE_UP], w.matrices[w.layers[layer, DOWN], GROUP]
        unit = max(1, group // PANEL)
        low, high = _share(c, c.shape.forward // PANEL // unit)
        step, scratch, stride = _rows_at_once(c.shape.width), c.rank * b.scratch_stride, CHUNK_BLOCKS * BLOCK
        for row in range(0, count, step):
            rows = min(step, count - row)
            for block in range(low * unit, high * unit, CHUNK_BLOCKS):
                end = min(block + CHUNK_BLOCKS, high * unit)
                linear(w.arena, w.matrices, matrix, b.a, x_row + row, rows, block, end, b.scratch, scratch, stride, 0)
                gate = Place(b.scratch, scratch - block * BLOCK, stride, BLOCK)
                up = Place(b.scratch, gate.at + PANEL, stride, BLOCK)
                segments, row_end = c.batch.segments, row + rows
                expand_all(c, segments, layer, GATE_OUT, row, row_end, block, end, gate, UP_OUT, block)
                expand_all(c, segments, layer, UP_OUT, row, row_end, block, end, up, GATE_OUT, end)
                finish(c, layer, group, row, rows, block, end)
        barrier(c.sync, c.size)

    return gate_up


def _make_head(linear, shrink_all, expand_all):
    @kernel
    def logits(c):
        """Logits of the rows that batch.out_rows names, -inf beyond the vocabulary. Ends with a barrier."""
        w, shape, batch, b = c.w, c.shape, c.batch, c.buffers
        count, group, padded = len(batch.out_rows), w.matrices[w.head, GROUP], w.matrices[w.head, ROWS]
        low, high = _share(c, count)
        for j in range(low, high):
            _norm_row(c, w.final_norm, group, batch.out_segments, batch.out_rows[j], j)
        barrier(c.sync, c.size)
        if len(batch.out_segments) > 0:
            shrink_all(c, batch.out_segments, batch.out_scales, shape.layers, 0, shape.width, b.a, 0)
        block0, block1 = _share(c, padded // BLOCK)
        linear(w.arena, w.matrices, w.head, b.a, 0, count, block0, block1, b.logits, block0 * BLOCK, padded, 0)
        panel0, panel1 = 2 * block0, min(2 * block1, (shape.vocabulary + PANEL - 1) // PANEL)
        to = Place(b.logits, 0, padded, PANEL)
        expand_all(c, batch.out_segments, shape.layers, 0, 0, count, panel0, panel1, to, 0, panel0)
        for j in range(count):
            for i in range(max(shape.vocabulary, block0 * BLOCK), block1 * BLOCK):
                b.logits[j * padded + i] = -np.inf
            first = block0 * BLOCK
            b.bests[j * c.size + c.rank] = first + argmax(b.logits, j * padded + first, (block1 - block0) * BLOCK)
        barrier(c.sync, c.size)

    return logits


@kernel
def _choose(c):
    """The tokens of batch.choices, as threads come free. Ends with a barrier."""
    batch, b, padded = c.batch, c.buffers, c.w.matrices[c.w.head, ROWS]
    i = claim(c.sync)
    while i < len(batch.choices):
        best = _best(c, batch.choices[i, CHOICE_ROW], padded)
        choose(batch, i, c.turn, best, b.logits, padded, b.chances, b.ids, c.rank * padded)
        i = claim(c.sync)
    barrier(c.sync, c.size)


@kernel
def _best(c, row, padded):
    """The best of all threads' best columns of a row, as argmax has it: threads have them in order."""
    b = c.buffers
    best = b.bests[row * c.size]
    for thread in range(1, c.size):
        other = b.bests[row * c.size + thread]
        so_far = b.logits[row * padded + best]
        if not (np.isnan(so_far) or b.logits[row * padded + other] <= so_far):
            best = other
    return best


# ---------------------------------------------------------------- the step


@cache
def make_step(formats: tuple[int, ...], kv_format: int, lora_format: int, head_unit: int):
    """The step for models whose matrices have these formats, with pages and adapters of these formats.

    head_unit: what the heads' size is a multiple of, 16 or 64. Everything else is a runtime value, so models that share
    all these share the machine code.
    """
    products, attention = make_linear.unit(formats), make_attention.unit(kv_format, head_unit)
    lora = make_lora.unit(lora_format)
    [linear], [attend, attend_part] = products.kernels, attention.kernels
    write_key, write_value = make_write(kv_format)
    shrink_all, expand_all, embed_rows = _make_adapters(lora_format, *lora.kernels)
    project_heads = _make_projection(linear, expand_all, write_key, write_value)
    attend_all = _make_attention(attend, attend_part)
    add_product = _make_output(linear, shrink_all, expand_all)
    gate_up = _make_gate_up(linear, expand_all)
    logits = _make_head(linear, shrink_all, expand_all)

    @kernel
    def prepare(c, layer, norm, matrix, which_in):
        """Normalised rows for a product, and the adapters' share of them; returns as _norm does."""
        x_row = _norm(c, c.w.layers[layer, norm], c.w.matrices[c.w.layers[layer, matrix], GROUP])
        if len(c.batch.segments) > 0:
            shrink_all(c, c.batch.segments, c.batch.scales, layer, which_in, c.shape.width, c.buffers.a, x_row)
        return x_row

    @kernel
    def forward(c):
        """All layers and the head: writes the rows' pages, buffers.logits and the chosen tokens."""
        w = c.w
        embed_rows(c)
        for layer in range(c.shape.layers):
            o, down = w.layers[layer, O], w.layers[layer, DOWN]
            x_row = prepare(c, layer, INPUT_NORM, QKV, QKV_IN)
            project_heads(c, layer, x_row)
            attend_all(c, layer)
            x_row = _quantize_attended(c, w.matrices[o, GROUP])
            add_product(c, layer, o, w.layers[layer, O_BIAS], O_IN, O_OUT, c.buffers.a, x_row, 0)
            x_row = prepare(c, layer, POST_NORM, GATE_UP, GATE_UP_IN)
            gate_up(c, layer, x_row)
            add_product(c, layer, down, w.layers[layer, DOWN_BIAS], DOWN_IN, DOWN_OUT, c.buffers.b, 0, 0)
        if len(c.batch.out_rows) > 0:
            logits(c)
            _choose(c)

    @kernel
    def step(rank, size, sync, packed, fixed):
        """A forward pass of batch's rows, and as many more, each with the tokens of the one before, as it asks for."""
        batch, (w, shape, kv, adapters, buffers) = unpack(packed), fixed
        turn, going = 0, True
        while going:
            forward(hold(Context(rank, size, sync, turn, w, shape, kv, batch, adapters, buffers)))
            turn += 1
            going = turn < rounds_of(batch) and not all_ended(batch, turn - 1)

    return team_program(step, (formats, kv_format, lora_format, head_unit), (products, attention, lora, SAMPLING))
