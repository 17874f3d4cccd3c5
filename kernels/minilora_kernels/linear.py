"""Matrix products: packed weights x the rows of a step, for every weight format and any number of rows.

A tile is 1 to 8 rows of activations times one block of 32 weight rows, or half of one. Whatever the tile, an output is
summed in the same order: int32 inside a group of columns (exact), then group by group in float32; for
floating-point weights column by column, or pair by pair. So a row's bits never depend on the rows beside it.
"""

import numpy as np
from numba import types
from numba.core.typing import signature

from . import cpu
from .formats import bits, is_float, rounds_inputs
from .inputs import INPUTS, UNROLLED
from .jit import kernel
from .kinds import BYTES, FLOATS, NUMBER, array
from .linear_float import make_float_tile, make_pair_tile
from .linear_quantized import make_quantized_tile, make_unpack, unpacked_bytes
from .linear_shapes import AHEAD, MANY, SHARERS, UNPACKED_TILES, shapes
from .pack import BLOCK, BLOCK_BYTES, COLUMNS, FORMAT, GROUP, OFFSET, columns_together
from .unit import unit


def _tile(rows: int, width: int, fmt: int):
    """The kernel of a tile for weights of this format."""
    if columns_together(fmt) == 2:
        return make_pair_tile(rows, width, rounds_inputs(fmt))
    return make_float_tile(rows, width, fmt) if is_float(fmt) else make_quantized_tile(rows, width, fmt)


def unpacks(fmt: int) -> bool:
    """Whether blocks of this format are unpacked once for many rows: not 8 bits, nor 4, the halves of bytes."""
    return not is_float(fmt) and bits(fmt) not in (4, 8)


def room_bytes(matrices: np.ndarray) -> int:
    """Bytes of room that `linear` takes for any of these matrices, rows of their table; a multiple of CACHE_LINE."""
    return max((unpacked_bytes(m[FORMAT], m[COLUMNS], m[GROUP]) for m in matrices if unpacks(m[FORMAT])), default=0)


def _block(fmt: int, sizes: tuple):
    """Some rows x 1 block: tiles of the first size while they fit, the rest in smaller ones."""
    height, width = sizes[0]
    mine = _tile(height, width, fmt)
    others = _block(fmt, sizes[1:]) if len(sizes) > 1 else None

    @kernel
    def block(weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add):
        m, soon, to = 0, ahead, out_at
        while rows - m >= height:
            mine(weights, at, 0, soon, columns, group, x, x_row + m, out, to, out_stride, add)
            # Only the first tile prefetches.
            if width == 1:
                mine(weights, at, 1, 0, columns, group, x, x_row + m, out, to, out_stride, add)
            m, soon, to = m + height, 0, to + height * out_stride
        if others is not None and m < rows:
            others(weights, at, soon, columns, group, x, x_row + m, rows - m, out, to, out_stride, add)

    return block


def _many_rows(fmt: int):
    """A kernel for many rows x 1 block, in tiles that suit so many; None where the usual ones do.

    It returns how many rows it took, from the first: 0 if they are not many enough. It takes the arguments of `block`
    and room for an unpacked block.
    """
    if unpacks(fmt):
        return _unpacking_block(fmt)
    return _block_of_many(fmt) if cpu.full_width() and not is_float(fmt) else None


def _block_of_many(fmt: int):
    """_many_rows in tiles of MANY, as many as leave a multiple of 4 rows."""
    mine = _tile(MANY, 2, fmt)

    @kernel
    def block_of_many(weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add, room, room_at):
        tiles = (rows - 4 * (-rows % MANY)) // MANY
        if rows < SHARERS * MANY or group < UNROLLED or tiles < SHARERS:
            return 0
        for i in range(tiles):
            share, m = ahead + ahead // SHARERS * i if i < SHARERS else 0, i * MANY
            mine(weights, at, 0, share, columns, group, x, x_row + m, out, out_at + m * out_stride, out_stride, add)
        return tiles * MANY

    return block_of_many


def _unpacking_block(fmt: int):
    """_many_rows in tiles of the largest size, for which the block is unpacked first."""
    height, width = shapes()[0]
    unpack, mine = make_unpack(fmt), make_quantized_tile(height, width, fmt, unpacked=True)

    @kernel
    def unpacking_block(
        weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add, room, room_at
    ):
        tiles = rows // height
        if tiles < UNPACKED_TILES:
            return 0
        unpack(weights, at, columns, group, room, room_at)
        for i in range(tiles):
            m = i * height
            to = out_at + m * out_stride
            # Tiles of width 1 take half a block.
            for half in range(3 - width):
                mine(room, room_at, half, 0, columns, group, x, x_row + m, out, to, out_stride, add)
        return tiles * height

    return unpacking_block


def _whole_block(fmt: int):
    """All rows of a step x 1 block: many as in _many_rows, those left over as in _block."""
    many, rest = _many_rows(fmt), _block(fmt, shapes())

    @kernel
    def whole_block(weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add, room, room_at):
        m, soon, to = 0, ahead, out_at
        if many is not None:
            m = many(weights, at, ahead, columns, group, x, x_row, rows, out, to, out_stride, add, room, room_at)
            soon, to = 0 if m > 0 else ahead, out_at + m * out_stride
        if m < rows:
            rest(weights, at, soon, columns, group, x, x_row + m, rows - m, out, to, out_stride, add)

    return whole_block


def _first_of(formats: tuple):
    """A kernel that calls the block kernel of its argument fmt, one of `formats`."""
    first = _whole_block(formats[0])
    if len(formats) == 1:

        @kernel
        def only(fmt, weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add, room, room_at):
            first(weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add, room, room_at)

        return only
    wanted, others = formats[0], _first_of(formats[1:])

    @kernel
    def choose(fmt, weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add, room, room_at):
        if fmt == wanted:
            first(weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add, room, room_at)
        else:
            others(fmt, weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add, room, room_at)

    return choose


_WEIGHTS, _OUT = (BYTES, array(np.int64, 2), NUMBER), (FLOATS, NUMBER, NUMBER, NUMBER)
_LINEAR = signature(types.none, *_WEIGHTS, INPUTS, NUMBER, NUMBER, NUMBER, NUMBER, *_OUT, BYTES, NUMBER)


@unit(lambda formats: (_LINEAR,))
def make_linear(formats: tuple[int, ...]):
    """`linear` for matrices of these formats and no others."""
    multiply, highest = _first_of(formats), shapes()[0][0]

    @kernel
    def linear(weights, matrices, matrix, x, x_row, rows, block0, block1, out, out_at, out_stride, add, room, room_at):
        """out[r, c] (+)= sum over k of x[x_row + r, k] * weight[32 * block0 + c, k].

        weights: uint8 arena; matrices: int64 [n, 6], matrix: row in it; x: Rows; rows: how many of them;
        block0, block1: range of the matrix's 32-row blocks; out: float32, row r from out_at + r * out_stride;
        add: 1 adds to what is there, 0 overwrites it; room: uint8, scratch: room_bytes from room_at on.
        """
        fmt, columns, group = matrices[matrix, FORMAT], matrices[matrix, COLUMNS], matrices[matrix, GROUP]
        size = matrices[matrix, BLOCK_BYTES]
        # A single tile streams through memory; several take one block after the other.
        ahead = AHEAD if rows <= highest else size
        at = matrices[matrix, OFFSET] + block0 * size
        for block in range(block0, block1):
            to = out_at + (block - block0) * BLOCK
            multiply(fmt, weights, at, ahead, columns, group, x, x_row, rows, out, to, out_stride, add, room, room_at)
            at += size

    return linear
