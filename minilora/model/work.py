"""How threads share out a step's work: once and for all where it is short, else so that they help each other."""

from typing import NamedTuple

from minilora_kernels.jit import kernel
from minilora_kernels.pack import BLOCK, BLOCK_BYTES, ROWS
from minilora_kernels.stealing import begin_work, take
from minilora_kernels.sync import share

# Rows of the largest AVX-512 tile; the unit in which work is counted. On other CPUs tiles have 4 rows, for many rows on
# Zen 5 they have 5: there more is read than bytes_of says.
TILE_ROWS = 8
# Threads help each other with work that reads so many bytes for each of them.
HELPED_BYTES = 1 << 20
# The most rows that a thread takes at once, and bytes of their inputs.
MOST_ROWS = 128
CACHE_BYTES = 256 * 1024
# Blocks of gate up that it takes at once with MOST_ROWS rows; with fewer rows it takes as many more.
CHUNK_BLOCKS = 8


@kernel
def share_of(c, total):
    """(first, end) of this thread's part of range(total)."""
    return share(total, c.thread, c.threads)


class Work(NamedTuple):
    """Items that threads share out: `length` for each `step` of the rows, `total` in all.

    helped: threads that are done help the others; grain: how many items are best done in one go.
    """

    length: int
    rows: int
    step: int
    total: int
    helped: bool
    grain: int


@kernel
def is_helped(c, size):
    """Whether work that reads so many bytes takes long enough for threads to help each other."""
    return c.threads > 1 and size >= HELPED_BYTES * c.threads


@kernel
def work_of(c, length, rows, step, size, grain):
    """Work that reads about `size` bytes. Between two barriers there is one."""
    helped = is_helped(c, size)
    if helped:
        begin_work(c.sync, c.thread)
    return Work(length, rows, step, (rows + step - 1) // step * length, helped, grain)


@kernel
def bytes_of(c, matrix, rows):
    """Bytes of a matrix that a product with so many rows reads, from memory or caches: once for each TILE_ROWS rows.

    Blocks that are unpacked first count as if they were not.
    """
    table = c.w.matrices
    return table[matrix, ROWS] // BLOCK * table[matrix, BLOCK_BYTES] * ((rows + TILE_ROWS - 1) // TILE_ROWS)


@kernel
def first_piece(c, work):
    """(first, end) of the items that this thread does before it calls next_piece."""
    if work.helped:
        return take(c.sync, c.thread, c.threads, work.total, work.grain)
    return share_of(c, work.total)


@kernel
def next_piece(c, work, at, end):
    """(first, end) of the items it does next: the rest of its piece, else a new piece; empty when the work is done."""
    if at < end:
        return at, end
    if work.helped:
        return take(c.sync, c.thread, c.threads, work.total, work.grain)
    return work.total, work.total


@kernel
def span_of(work, at, end):
    """(row, rows, low, high): the range of rows in which a piece begins, and which of that range's `length` items it
    covers.
    """
    row, low = at // work.length * work.step, at % work.length
    return row, min(work.step, work.rows - row), low, min(low + end - at, work.length)


@kernel
def rows_at_once(columns):
    """How many rows' int8 inputs stay in the second-level cache together with the weights of a chunk."""
    return min(MOST_ROWS, max(TILE_ROWS, CACHE_BYTES // columns // TILE_ROWS * TILE_ROWS))
