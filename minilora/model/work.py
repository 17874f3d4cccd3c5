"""How threads share out a step's work: once and for all where it is short, else so that who is done helps the others."""

from typing import NamedTuple

from minilora_kernels.jit import kernel
from minilora_kernels.pack import BLOCK, BLOCK_BYTES, ROWS
from minilora_kernels.stealing import begin_work, take
from minilora_kernels.sync import share

# Rows of the highest tile of products.
TILE_ROWS = 8
# Threads help each other with work that reads so many bytes for each of them.
HELPED_BYTES = 1 << 20
# Rows that a thread takes at once, and bytes of their inputs.
MOST_ROWS = 128
CACHE_BYTES = 256 * 1024
# Blocks of gate up that it takes at once beside MOST_ROWS rows; beside fewer rows it takes as many more.
CHUNK_BLOCKS = 8


@kernel
def share_of(c, total):
    """(first, end) of this thread's part of range(total)."""
    return share(total, c.thread, c.threads)


class Work(NamedTuple):
    """Items that threads share out: `length` for each `step` of the rows, `total` in all.

    helped: who is done helps others; grain: how many items are best done in one go.
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
    """Bytes of a matrix that a product with so many rows reads, from wherever: once for every tile."""
    table = c.w.matrices
    return table[matrix, ROWS] // BLOCK * table[matrix, BLOCK_BYTES] * ((rows + TILE_ROWS - 1) // TILE_ROWS)


@kernel
def first_piece(c, work):
    """(first, end) of the items that this thread does before it asks for the next_piece."""
    if work.helped:
        return take(c.sync, c.thread, c.threads, work.total, work.grain)
    return share_of(c, work.total)


@kernel
def next_piece(c, work, at, end):
    """(first, end) of the items that it does next: what is left of its piece, from `at` on, or another; empty at the end."""
    if at < end:
        return at, end
    if work.helped:
        return take(c.sync, c.thread, c.threads, work.total, work.grain)
    return work.total, work.total


@kernel
def span_of(work, at, end):
    """(row, rows, low, high): of a piece, the rows of its first item, and the items low .. high of the `length` they have."""
    row, low = at // work.length * work.step, at % work.length
    return row, min(work.step, work.rows - row), low, min(low + end - at, work.length)


@kernel
def rows_at_once(columns):
    """Rows whose int8 inputs stay in the second-level cache beside the weights of a chunk."""
    return min(MOST_ROWS, max(TILE_ROWS, CACHE_BYTES // columns // TILE_ROWS * TILE_ROWS))
