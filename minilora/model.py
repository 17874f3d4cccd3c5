"""The forward step of a Llama-family decoder: one compiled function that every thread of the team runs.

A step takes T rows: any mix of prefill chunks and decodes of B sequences, with any adapters. Each phase splits
its work over the threads; a barrier ends it:

    embed | norm, q k v, rotate, write pages | attend | o | norm, gate up, silu | down | ... | norm, head

For up to FEW rows every thread normalises and quantises all of them itself, which costs less than a barrier.
With adapters, `shrink` and a barrier come before each product. Whatever the batch and the team, each number is
computed by the same operations in the same order.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from minilora_kernels.attention import Query, make_attention, merge_parts, partial_size, scratch_size
from minilora_kernels.jit import kernel, program
from minilora_kernels.linear import Rows, make_linear
from minilora_kernels.lora import make_lora
from minilora_kernels.pack import BLOCK, COLUMNS, GROUP, PANEL, ROWS
from minilora_kernels.pointwise import add_row, embed, quantize_row, rms_norm, rope, silu_mul
from minilora_kernels.team import barrier, claim, share

from .adapters import DOWN_IN, DOWN_OUT, GATE_OUT, GATE_UP_IN, O_IN, O_OUT, Q_OUT, QKV_IN
from .batch import TILE_PAGES, TILE_PARTS, TILE_POSITION, TILE_ROW, TILE_SPLIT, TILE_SPLITS, TILE_TOKENS
from .weights import (
    DOWN,
    DOWN_BIAS,
    GATE_UP,
    GATE_UP_BIAS,
    INPUT_NORM,
    K_NORM,
    O,
    O_BIAS,
    POST_NORM,
    Q_NORM,
    QKV,
    QKV_BIAS,
    QKV_PARTS,
    ROTARY,
    WINDOW,
)

FEW = 8
CHUNK_BLOCKS = 8
MOST_ROWS = 256
CACHE_BYTES = 256 * 1024

ONE = np.float32(1)


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
    s: [T, s_stride], shrunk rows; scratch: scratch_stride numbers for each thread; parts: unmerged attention;
    logits: [rows, vocabulary padded to 32]. shared: T at most; from that row of `a` on, FEW rows for each thread.
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
    shared: int


@kernel
def _rows_at_once(columns):
    """Rows whose int8 inputs stay in the second-level cache beside the weights of a chunk."""
    return min(MOST_ROWS, max(8, CACHE_BYTES // columns // 8 * 8))


# ---------------------------------------------------------------- inputs of the products


@kernel
def _norm_one(weights, norm_at, shape, x, x_row, group, rows, row):
    rms_norm(x, x_row * shape.width, shape.width, weights, norm_at, shape.eps, rows.values, row * rows.stride)
    if group > 0:
        quantize_row(rows.values, row * rows.stride, shape.width, group, rows, row, 0)


@kernel
def _norm(rank, size, sync, count, weights, norm_at, shape, group, buffers):
    """Normalised, quantised rows of x; returns the row of buffers.a where this thread finds the first."""
    if count <= FEW:
        first = buffers.shared + rank * FEW
        for r in range(count):
            _norm_one(weights, norm_at, shape, buffers.x, r, group, buffers.a, first + r)
        return first
    low, high = share(count, rank, size)
    for r in range(low, high):
        _norm_one(weights, norm_at, shape, buffers.x, r, group, buffers.a, r)
    barrier(sync, size)
    return 0


@kernel
def _quantize_attended(rank, size, sync, count, columns, group, rows, shared):
    """Quantise what attention left in rows 0 .. count of a; returns as _norm does."""
    if group == 0:
        return 0
    if count <= FEW:
        first = shared + rank * FEW
        for r in range(count):
            quantize_row(rows.values, r * rows.stride, columns, group, rows, first + r, 0)
        return first
    low, high = share(count, rank, size)
    for r in range(low, high):
        quantize_row(rows.values, r * rows.stride, columns, group, rows, r, 0)
    barrier(sync, size)
    return 0


# ---------------------------------------------------------------- adapters


def _make_adapters(lora_format):
    shrink, gather, expand = make_lora(lora_format)

    @kernel
    def shrink_all(rank, size, sync, segments, scales, adapters, layer, which, columns, x, x_row, buffers):
        """s = scale * x A of every segment, for the matrices that read input `which`. Ends with a barrier."""
        turn = 0
        for i in range(len(segments)):
            slot = segments[i, 2]
            at, padded = adapters.inputs[slot, layer, which, 0], adapters.inputs[slot, layer, which, 1]
            for panel in range(padded // PANEL):
                for row in range(segments[i, 0], segments[i, 1], BLOCK):
                    if turn % size == rank:
                        count = min(BLOCK, segments[i, 1] - row)
                        shrink(adapters.arena, at, columns, panel, x.values, (x_row + row) * x.stride, x.stride, count,
                               scales[i], buffers.s, row * buffers.s_stride, buffers.s_stride)
                    turn += 1
        barrier(sync, size)

    @kernel
    def expand_all(segments, adapters, layer, which, row0, row1, low, high, buffers, out, out_at, out_stride, step):
        """Add s B of matrix `which` to rows row0 .. row1, panels low .. high.

        out_at: place of row row0's panel 0; step: from panel to panel.
        """
        if low >= high:
            return
        for i in range(len(segments)):
            slot = segments[i, 2]
            at, ranks = adapters.outputs[slot, layer, which, 0], adapters.outputs[slot, layer, which, 1]
            column = adapters.outputs[slot, layer, which, 2]
            first, end = max(row0, segments[i, 0]), min(row1, segments[i, 1])
            if ranks > 0 and first < end:
                expand(adapters.arena, at, ranks, low, high, buffers.s, first * buffers.s_stride + column,
                       buffers.s_stride, end - first, out, out_at + (first - row0) * out_stride + low * step,
                       out_stride, step)

    @kernel
    def embed_rows(rank, size, w, shape, batch, adapters, buffers):
        """x = the rows of the input embedding, with the adapters' parts."""
        low, high = share(len(batch.tokens), rank, size)
        for r in range(low, high):
            embed(w.arena, w.matrices, w.embed, batch.tokens[r], buffers.x, r * shape.width)
        for i in range(len(batch.segments)):
            slot = batch.segments[i, 2]
            a_at, b_at, ranks = adapters.embed[slot, 0], adapters.embed[slot, 1], adapters.embed[slot, 2]
            if ranks == 0:
                continue
            padded = (ranks + PANEL - 1) // PANEL * PANEL
            for r in range(max(low, batch.segments[i, 0]), min(high, batch.segments[i, 1])):
                s_at = r * buffers.s_stride
                gather(adapters.arena, a_at, padded, batch.tokens[r], batch.scales[i], buffers.s, s_at)
                expand(adapters.arena, b_at, ranks, 0, shape.width // PANEL, buffers.s, s_at, 0, 1,
                       buffers.x, r * shape.width, 0, PANEL)

    return shrink_all, expand_all, embed_rows


# ---------------------------------------------------------------- attention


def _make_projection(linear, expand_all, write_key, write_value):
    @kernel
    def multiply(w, layer, x_row, rows, block0, block1, buffers, at, stride):
        """Blocks block0 .. block1 of q k v, which are stored as one to three matrices."""
        start = 0
        for part in range(w.layers[layer, QKV_PARTS]):
            matrix = w.layers[layer, QKV] + part
            end = start + w.matrices[matrix, ROWS] // BLOCK
            low, high = max(block0, start), min(block1, end)
            if low < high:
                to = at + (low - block0) * BLOCK
                linear(w.arena, w.matrices, matrix, buffers.a, x_row, rows, low - start, high - start,
                       buffers.qkv, to, stride, 0)
            start = end

    @kernel
    def adapt(layer, shape, adapters, batch, row0, row1, head0, head1, buffers, stride):
        """Add the adapters' parts of heads head0 .. head1: queries, then keys, then values."""
        first, end = head0 * shape.head_dim // PANEL, head1 * shape.head_dim // PANEL
        start = 0
        for which in range(3):
            heads = shape.heads if which == Q_OUT else shape.kv_heads
            panels = heads * shape.head_dim // PANEL
            expand_all(batch.segments, adapters, layer, which, row0, row1, max(first - start, 0),
                       min(end - start, panels), buffers, buffers.qkv, row0 * stride + start * PANEL, stride, PANEL)
            start += panels

    @kernel
    def finish(w, layer, shape, kv, position, page, head, x, at):
        """Norm and rotation of one head; keys and values go to their page."""
        key, value = head - shape.heads, head - shape.heads - shape.kv_heads
        if value >= 0:
            write_value(kv, layer, page, position % kv.page, value, x, at)
            return
        norm = w.layers[layer, Q_NORM] if key < 0 else w.layers[layer, K_NORM]
        if norm >= 0:
            rms_norm(x, at, shape.head_dim, w.arena, norm, shape.eps, x, at)
        if w.layers[layer, ROTARY] == 1:
            rope(x, at, w.half, w.cos, w.sin, position * w.half)
        if key >= 0:
            write_key(kv, layer, page, position % kv.page, key, x, at)

    @kernel
    def project_heads(rank, size, layer, w, shape, kv, batch, adapters, x_row, buffers):
        """q k v of this thread's heads, ready for attention."""
        heads, stride = shape.heads + 2 * shape.kv_heads, buffers.qkv_stride
        unit = 1 if shape.head_dim % BLOCK == 0 else 2
        low, high = share((heads + unit - 1) // unit, rank, size)
        head0, head1 = low * unit, min(high * unit, heads)
        block0, block1 = head0 * shape.head_dim // BLOCK, (head1 * shape.head_dim + BLOCK - 1) // BLOCK
        bias, step = w.layers[layer, QKV_BIAS], _rows_at_once(shape.width)
        for row in range(0, len(batch.tokens), step):
            rows = min(step, len(batch.tokens) - row)
            multiply(w, layer, x_row + row, rows, block0, block1, buffers, row * stride + block0 * BLOCK, stride)
            adapt(layer, shape, adapters, batch, row, row + rows, head0, head1, buffers, stride)
            for r in range(row, row + rows):
                position = batch.positions[r]
                page = batch.pages[batch.pages_at[r] + position // kv.page]
                for head in range(head0, head1):
                    column = head * shape.head_dim
                    if bias >= 0:
                        add_row(buffers.qkv, r * stride + column, w.arena, bias + 4 * column, shape.head_dim)
                    finish(w, layer, shape, kv, position, page, head, buffers.qkv, r * stride + column)

    return project_heads


def _make_attention(attend, attend_part):
    @kernel
    def attend_all(rank, size, sync, layer, w, shape, kv, batch, buffers):
        """Attention of all heads, tile by tile as threads come free; the results are rows of buffers.a."""
        group, window, a = shape.heads // shape.kv_heads, w.layers[layer, WINDOW], buffers.a
        scratch_at = rank * buffers.scratch_stride
        item = claim(sync)
        while item < len(batch.tiles) * shape.kv_heads:
            tile, head = item // shape.kv_heads, item % shape.kv_heads
            row, split = batch.tiles[tile, TILE_ROW], batch.tiles[tile, TILE_SPLIT]
            query = Query(layer, head, group, batch.tiles[tile, TILE_POSITION], batch.tiles[tile, TILE_TOKENS], window,
                          batch.tiles[tile, TILE_PAGES])
            column = head * group * shape.head_dim
            q_at = row * buffers.qkv_stride + column
            if split < 0:
                attend(kv, query, batch.pages, buffers.qkv, q_at, buffers.qkv_stride,
                       a.values, row * a.stride + column, a.stride, buffers.scratch, scratch_at)
            else:
                part = batch.tiles[tile, TILE_PARTS]
                part += (head * batch.tiles[tile, TILE_SPLITS] + split) * group * (shape.head_dim + 2)
                attend_part(kv, query, batch.pages, split, buffers.qkv, q_at, buffers.qkv_stride,
                            buffers.parts, part, buffers.scratch, scratch_at)
            item = claim(sync)
        barrier(sync, size)
        if len(batch.merges) > 0:
            merge_all(rank, size, shape, batch, buffers)
            barrier(sync, size)

    @kernel
    def merge_all(rank, size, shape, batch, buffers):
        group = shape.heads // shape.kv_heads
        low, high = share(len(batch.merges) * shape.heads, rank, size)
        for i in range(low, high):
            tile, head = batch.merges[i // shape.heads], i % shape.heads
            splits, row = batch.tiles[tile, TILE_SPLITS], batch.tiles[tile, TILE_ROW]
            part = batch.tiles[tile, TILE_PARTS] + head // group * splits * group * (shape.head_dim + 2)
            merge_parts(buffers.parts, part, splits, group, head % group, shape.head_dim,
                        buffers.a.values, row * buffers.a.stride + head * shape.head_dim)

    return attend_all


# ---------------------------------------------------------------- back into the stream


def _make_output(linear, shrink_all, expand_all):
    @kernel
    def add_product(rank, size, sync, layer, w, shape, batch, adapters, matrix, bias, which_in, which_out, x, x_row,
                    values_row, buffers):
        """x += this thread's columns of input W, with bias and adapters: o and down. Ends with a barrier."""
        columns = w.matrices[matrix, COLUMNS]
        if len(batch.segments) > 0:
            shrink_all(rank, size, sync, batch.segments, batch.scales, adapters, layer, which_in, columns, x,
                       values_row, buffers)
        block0, block1 = share(shape.width // BLOCK, rank, size)
        step = _rows_at_once(columns)
        for row in range(0, len(batch.tokens), step):
            rows = min(step, len(batch.tokens) - row)
            to = row * shape.width
            linear(w.arena, w.matrices, matrix, x, x_row + row, rows, block0, block1,
                   buffers.x, to + block0 * BLOCK, shape.width, 1)
            expand_all(batch.segments, adapters, layer, which_out, row, row + rows, 2 * block0, 2 * block1, buffers,
                       buffers.x, to, shape.width, PANEL)
            if bias >= 0:
                for r in range(rows):
                    column = block0 * BLOCK
                    add_row(buffers.x, to + r * shape.width + column, w.arena, bias + 4 * column,
                            (block1 - block0) * BLOCK)
        barrier(sync, size)

    return add_product


def _make_gate_up(linear, expand_all):
    @kernel
    def gate_up(rank, size, layer, w, shape, batch, adapters, x_row, buffers):
        """silu(gate) * up for this thread's columns, quantised: rows of buffers.b."""
        matrix, down = w.layers[layer, GATE_UP], w.layers[layer, DOWN]
        group, bias, b = w.matrices[down, GROUP], w.layers[layer, GATE_UP_BIAS], buffers.b
        unit = max(1, group // PANEL)
        low, high = share(shape.forward // PANEL // unit, rank, size)
        step, scratch, stride = _rows_at_once(shape.width), rank * buffers.scratch_stride, CHUNK_BLOCKS * BLOCK
        for row in range(0, len(batch.tokens), step):
            rows = min(step, len(batch.tokens) - row)
            for block in range(low * unit, high * unit, CHUNK_BLOCKS):
                end = min(block + CHUNK_BLOCKS, high * unit)
                linear(w.arena, w.matrices, matrix, buffers.a, x_row + row, rows, block, end,
                       buffers.scratch, scratch, stride, 0)
                for which in range(2):
                    to = scratch - block * BLOCK + which * PANEL
                    expand_all(batch.segments, adapters, layer, GATE_OUT + which, row, row + rows, block, end, buffers,
                               buffers.scratch, to, stride, BLOCK)
                for r in range(rows):
                    to = (row + r) * b.stride + block * PANEL
                    if bias >= 0:
                        add_row(buffers.scratch, scratch + r * stride, w.arena, bias + 4 * block * BLOCK,
                                (end - block) * BLOCK)
                    silu_mul(buffers.scratch, scratch + r * stride, end - block, b.values, to)
                    if group > 0:
                        quantize_row(b.values, to, (end - block) * PANEL, group, b, row + r, block * PANEL)

    return gate_up


def _make_head(linear, shrink_all, expand_all):
    @kernel
    def logits(rank, size, sync, w, shape, batch, adapters, buffers):
        """Logits of the rows that batch.out_rows names; beyond the vocabulary -inf."""
        count, a = len(batch.out_rows), buffers.a
        group, padded = w.matrices[w.head, GROUP], w.matrices[w.head, ROWS]
        low, high = share(count, rank, size)
        for j in range(low, high):
            _norm_one(w.arena, w.final_norm, shape, buffers.x, batch.out_rows[j], group, a, j)
        barrier(sync, size)
        if len(batch.out_segments) > 0:
            shrink_all(rank, size, sync, batch.out_segments, batch.out_scales, adapters, shape.layers, 0, shape.width,
                       a, 0, buffers)
        block0, block1 = share(padded // BLOCK, rank, size)
        linear(w.arena, w.matrices, w.head, a, 0, count, block0, block1, buffers.logits, block0 * BLOCK, padded, 0)
        expand_all(batch.out_segments, adapters, shape.layers, 0, 0, count, 2 * block0,
                   min(2 * block1, (shape.vocabulary + PANEL - 1) // PANEL), buffers, buffers.logits, 0, padded, PANEL)
        if rank == size - 1:
            for j in range(count):
                for i in range(shape.vocabulary, padded):
                    buffers.logits[j * padded + i] = -np.inf

    return logits


# ---------------------------------------------------------------- the step


@cache
def make_step(formats: tuple[int, ...], kv_format: int, lora_format: int):
    """The step for models whose matrices have these formats, with pages and adapters of these formats.

    Everything else is a runtime value, so models that share formats share the machine code.
    """
    linear = make_linear(formats)
    write_key, write_value, attend, attend_part = make_attention(kv_format)
    shrink_all, expand_all, embed_rows = _make_adapters(lora_format)
    project_heads = _make_projection(linear, expand_all, write_key, write_value)
    attend_all = _make_attention(attend, attend_part)
    add_product = _make_output(linear, shrink_all, expand_all)
    gate_up = _make_gate_up(linear, expand_all)
    logits = _make_head(linear, shrink_all, expand_all)

    def step(rank, size, sync, w, shape, kv, batch, adapters, buffers):
        """One forward pass of batch's rows: writes their pages, and buffers.logits of the rows asked for."""
        count, a, b = len(batch.tokens), buffers.a, buffers.b
        embed_rows(rank, size, w, shape, batch, adapters, buffers)
        barrier(sync, size)
        for layer in range(shape.layers):
            o, down = w.layers[layer, O], w.layers[layer, DOWN]
            group = w.matrices[w.layers[layer, QKV], GROUP]
            x_row = _norm(rank, size, sync, count, w.arena, w.layers[layer, INPUT_NORM], shape, group, buffers)
            if len(batch.segments) > 0:
                shrink_all(rank, size, sync, batch.segments, batch.scales, adapters, layer, QKV_IN, shape.width, a,
                           x_row, buffers)
            project_heads(rank, size, layer, w, shape, kv, batch, adapters, x_row, buffers)
            barrier(sync, size)
            attend_all(rank, size, sync, layer, w, shape, kv, batch, buffers)
            x_row = _quantize_attended(rank, size, sync, count, shape.heads * shape.head_dim, w.matrices[o, GROUP], a,
                                       buffers.shared)
            add_product(rank, size, sync, layer, w, shape, batch, adapters, o, w.layers[layer, O_BIAS], O_IN, O_OUT,
                        a, x_row, 0, buffers)
            group = w.matrices[w.layers[layer, GATE_UP], GROUP]
            x_row = _norm(rank, size, sync, count, w.arena, w.layers[layer, POST_NORM], shape, group, buffers)
            if len(batch.segments) > 0:
                shrink_all(rank, size, sync, batch.segments, batch.scales, adapters, layer, GATE_UP_IN, shape.width, a,
                           x_row, buffers)
            gate_up(rank, size, layer, w, shape, batch, adapters, x_row, buffers)
            barrier(sync, size)
            add_product(rank, size, sync, layer, w, shape, batch, adapters, down, w.layers[layer, DOWN_BIAS], DOWN_IN,
                        DOWN_OUT, b, 0, 0, buffers)
        if len(batch.out_rows) > 0:
            logits(rank, size, sync, w, shape, batch, adapters, buffers)

    return program(step, (formats, kv_format, lora_format))
