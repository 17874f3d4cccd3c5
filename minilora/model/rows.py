"""Rows of the stream: the inputs of products, normalised and quantised, and those that go on to the end.

Quantised inputs are groups of integers or, for formats that round inputs, bfloat16.
"""

from minilora_kernels.formats import INT8, PAIR
from minilora_kernels.jit import kernel
from minilora_kernels.pack import BLOCK, PANEL
from minilora_kernels.pointwise import rms_norm
from minilora_kernels.quantize_rows import quantize_row, quantize_row_finely, round_row
from minilora_kernels.simd_memory import load_f32, store_f32
from minilora_kernels.sync import barrier

from .arrays import FEW
from .work import first_piece, next_piece, share_of, work_of

# Groups of inputs that int8 adapters read beside floating-point weights.
FLOATS_GROUP = 32


@kernel
def has_int8_adapters(c):
    """Whether there are adapters that read inputs as `fine`, see Rows."""
    return len(c.rows.segments) > 0 and c.adapters.fmt == INT8


@kernel
def place_of_values(c, group, rows, at, scratch_at):
    """(array, at): where a row's floats go: rows.values[at] if adapters, or weights that are floats, read them there.

    If they are only to be quantised or rounded they stay in scratch, in the nearest cache.
    """
    if group == 0 or (len(c.rows.segments) > 0 and not has_int8_adapters(c)):
        return rows.values, at
    return c.buffers.scratch, scratch_at


@kernel
def input_group(group):
    """The group in which inputs of a matrix are quantised: for int8 adapters even if its weights are floats."""
    return group if group > PAIR else FLOATS_GROUP


@kernel
def quantize_if_read(c, x, at, n, group, rows, row, column):
    """quantize_row or round_row for a matrix of this group, and finely for adapters; nothing if both read floats."""
    if has_int8_adapters(c):
        quantize_row_finely(x, at, n, input_group(group), rows, row, column)
    elif group > PAIR:
        quantize_row(x, at, n, group, rows, row, column)
    if group == PAIR:
        round_row(x, at, n, rows, row, column)


@kernel
def norm_row(c, norm_at, group, x_row, row):
    """Row x_row of the stream, normalised and quantised: row `row` of buffers.a."""
    a, width = c.buffers.a, c.shape.width
    values, at = place_of_values(c, group, a, row * a.stride, c.thread * c.buffers.scratch_stride)
    rms_norm(c.buffers.x, x_row * width, width, c.w.arena, norm_at, c.shape.eps, values, at)
    quantize_if_read(c, values, at, width, group, a, row, 0)


@kernel
def _quantize_attended_row(c, columns, group, attended, row):
    """Row `row` of buffers.a from what attention left in row `attended`."""
    a = c.buffers.a
    quantize_if_read(c, a.values, attended * a.stride, columns, group, a, row, 0)


def _for_all_rows(prepare):
    """A kernel that calls prepare(c, what, group, x_row, row) for all rows, of `size` bytes each.

    It returns the row of buffers.a where this thread finds the first.
    """

    @kernel
    def for_all_rows(c, what, group, size):
        count = len(c.rows.tokens)
        if count <= FEW:
            first = c.buffers.shared + c.thread * FEW
            for r in range(count):
                prepare(c, what, group, r, first + r)
            return first
        work = work_of(c, 1, count, 1, count * size, 1)
        r, end = first_piece(c, work)
        while r < end:
            prepare(c, what, group, r, r)
            r, end = next_piece(c, work, r + 1, end)
        barrier(c.sync, c.threads)
        return 0

    return for_all_rows


_norm_all, _quantize_all = _for_all_rows(norm_row), _for_all_rows(_quantize_attended_row)


@kernel
def norm_rows(c, norm_at, group):
    """All rows of the stream, normalised and quantised; returns where in buffers.a this thread finds the first row."""
    return _norm_all(c, norm_at, group, 4 * c.shape.width)


@kernel
def quantize_attended(c, group):
    """Quantise what attention left in the rows of buffers.a; returns as norm_rows does."""
    if group == 0 and not has_int8_adapters(c):
        return 0
    columns = c.shape.heads * c.shape.head_dim
    return _quantize_all(c, columns, group, 4 * columns)


@kernel
def keep_wanted(c):
    """Row out_rows[j] of the stream becomes row j: the wanted ones close ranks. Ends with a barrier."""
    x, width = c.buffers.x, c.shape.width
    low, high = share_of(c, width // BLOCK)
    for j in range(len(c.batch.out_rows)):
        at, to = c.batch.out_rows[j] * width, j * width
        for i in range(low * BLOCK, high * BLOCK, PANEL):
            store_f32(x, to + i, load_f32(x, at + i))
    barrier(c.sync, c.threads)
