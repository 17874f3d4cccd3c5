"""How threads share out a step's work: once and for all where it is short, else so that who is done helps the others."""

from typing import NamedTuple

from minilora_kernels.jit import kernel
from minilora_kernels.pack import BLOCK, BLOCK_BYTES, ROWS
from minilora_kernels.stealing import begin_work, take
from minilora_kernels.sync import share

from .arrays import FEW

# Of work that reads so many bytes for each thread they help each other.
SHARED_BYTES = 1 << 20
# What a thread takes at once: rows, bytes of their inputs, and of so many rows blocks of gate up; of fewer rows more.
MOST_ROWS = 128
CACHE_BYTES = 256 * 1024
CHUNK_BLOCKS = 8


@kernel
def share_of(c, total):
    """(first, end) of this thread's part of range(total)."""
    return share(total, c.thread, c.threads)


class Work(NamedTuple):
    """Items that threads share out: `length` for each `step` of the rows, `total` in all.

    shared: who is done helps others; grain: how many items are best done in one go.
    """

    length: int
    rows: int
    step: int
    total: int
    shared: bool
    grain: int


@kernel
def is_shared(c, size):
    """Whether work that reads so many bytes takes long enough for threads to help each other."""
    return size >= SHARED_BYTES * c.threads


@kernel
def work_of(c, length, rows, step, size, grain):
    """Work that reads `size` bytes. Between two barriers there is one."""
    shared = is_shared(c, size)
    if shared:
        begin_work(c.sync, c.thread)
    return Work(length, rows, step, (rows + step - 1) // step * length, shared, grain)


@kernel
def bytes_of(c, matrix, rows):
    """Bytes of a matrix that a product with so many rows reads, from wherever: once for every tile of 8 rows."""
    table = c.w.matrices
    return table[matrix, ROWS] // BLOCK * table[matrix, BLOCK_BYTES] * ((rows + FEW - 1) // FEW)


@kernel
def first_piece(c, work):
    """(first, end) of the items that this thread does before it asks for the next_piece."""
    if work.shared:
        return take(c.sync, c.thread, c.threads, work.total, work.grain)
    return share_of(c, work.total)


@kernel
def next_piece(c, work, at, end):
    """(first, end) of the items that it does next: what is left of its piece, from `at` on, or another; empty at the end."""
    if at < end:
        return at, end
    if work.shared:
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
    return min(MOST_ROWS, max(8, CACHE_BYTES // columns // 8 * 8))
