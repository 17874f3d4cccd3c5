"""A product with a step's weights; those of the residual stream: o and down, which add to it, and gate up between."""

from minilora_kernels.jit import kernel
from minilora_kernels.lora_expand import Place
from minilora_kernels.pack import BLOCK, COLUMNS, GROUP, PANEL
from minilora_kernels.pointwise import add_row, silu_mul
from minilora_kernels.sync import barrier

from ..adapters import GATE_OUT, UP_OUT
from ..plan import DOWN, GATE_UP, GATE_UP_BIAS
from .rows import input_group, place_of_values, quantize_if_read
from .work import CHUNK_BLOCKS, MOST_ROWS, bytes_of, first_piece, next_piece, rows_at_once, span_of, work_of


def make_product(linear):
    """The kernel product: `linear` with the step's weights, and with room of the thread's own."""

    @kernel
    def product(c, matrix, x, x_row, rows, block0, block1, out, out_at, out_stride, add):
        """out (+)= rows of x times blocks block0 .. block1 of a matrix; arguments as in `linear`."""
        w, b = c.w, c.buffers
        room, room_at = b.unpacked, c.thread * b.unpacked_stride
        linear(w.arena, w.matrices, matrix, x, x_row, rows, block0, block1, out, out_at, out_stride, add, room, room_at)

    return product


def make_add_product(product, shrink_all, expand_all):
    """The kernel add_product, for o and down."""

    @kernel
    def add_product(c, layer, matrix, bias, which_in, which_out, x, quantized_row, values_row):
        """x += o or down, with bias and adapters. Ends with a barrier.

        quantized_row: first of the quantised rows of `x`, see `rows`; values_row: of the float ones.
        """
        w, b, width, count = c.w, c.buffers, c.shape.width, len(c.rows.tokens)
        columns, group = w.matrices[matrix, COLUMNS], w.matrices[matrix, GROUP]
        x_row = quantized_row if group > 0 else values_row
        shrink_all(c, layer, which_in, columns, group, x, quantized_row, values_row, which_out, width)
        work = work_of(c, width // BLOCK, count, rows_at_once(columns), bytes_of(c, matrix, count), 1)
        first, end = first_piece(c, work)
        while first < end:
            row, rows, block0, block1 = span_of(work, first, end)
            at, column = row * width, block0 * BLOCK
            product(c, matrix, x, x_row + row, rows, block0, block1, b.x, at + column, width, 1)
            to, low, high = Place(b.x, at, width, PANEL), 2 * block0, 2 * block1
            expand_all(c, layer, which_out, row, row + rows, low, high, to, which_out, low)
            for r in range(rows if bias >= 0 else 0):
                add_row(b.x, at + r * width + column, w.arena, bias + 4 * column, (block1 - block0) * BLOCK)
            first, end = next_piece(c, work, first + block1 - block0, end)
        barrier(c.sync, c.threads)

    return add_product


@kernel
def finish_gate_up(c, layer, group, row, rows, block, end, stride):
    """silu(gate) * up of a chunk in scratch, quantised: columns of buffers.b."""
    b, count = c.buffers, end - block
    at, bias = c.thread * b.scratch_stride, c.w.layers[layer, GATE_UP_BIAS]
    for r in range(row, row + rows):
        values, to = place_of_values(c, group, b.b, r * b.b.stride + block * PANEL, at)
        if bias >= 0:
            add_row(b.scratch, at, c.w.arena, bias + 4 * block * BLOCK, count * BLOCK)
        silu_mul(b.scratch, at, count, values, to)
        quantize_if_read(c, values, to, count * PANEL, group, b.b, r, block * PANEL)
        at += stride


def make_gate_up(product, expand_all):
    """The kernel gate_up."""

    @kernel
    def gate_up(c, layer, x_row):
        """silu(gate) * up. Ends with a barrier."""
        w, b, count = c.w, c.buffers, len(c.rows.tokens)
        matrix, group = w.layers[layer, GATE_UP], w.matrices[w.layers[layer, DOWN], GROUP]
        # Threads take whole quantisation groups; CHUNK_BLOCKS and the model's columns are multiples of one.
        unit = input_group(group) // PANEL
        units, size = c.shape.forward // PANEL // unit, bytes_of(c, matrix, count)
        # As much as scratch holds.
        chunk = CHUNK_BLOCKS * max(1, MOST_ROWS // count)
        scratch, stride = c.thread * b.scratch_stride, chunk * BLOCK
        work = work_of(c, units, count, rows_at_once(c.shape.width), size, CHUNK_BLOCKS // unit)
        first, end = first_piece(c, work)
        while first < end:
            row, rows, low, high = span_of(work, first, end)
            block, last = low * unit, min(high * unit, low * unit + chunk)
            product(c, matrix, b.a, x_row + row, rows, block, last, b.scratch, scratch, stride, 0)
            gate = Place(b.scratch, scratch - block * BLOCK, stride, BLOCK)
            up = Place(b.scratch, gate.at + PANEL, stride, BLOCK)
            expand_all(c, layer, GATE_OUT, row, row + rows, block, last, gate, UP_OUT, block)
            expand_all(c, layer, UP_OUT, row, row + rows, block, last, up, GATE_OUT, last)
            finish_gate_up(c, layer, group, row, rows, block, last, stride)
            first, end = next_piece(c, work, first + (last - block) // unit, end)
        barrier(c.sync, c.threads)

    return gate_up
