"""Matrix products: packed weights x the rows of a step, for every weight format and any number of rows.

A tile is 1 to 8 rows of activations times one block of 32 weight rows, or half of one. Whatever the tile, an output is
summed in the same order: int32 inside a group of columns (exact), then group by group in float32; for
floating-point weights column by column. So a row's bits never depend on the rows beside it.
"""

from typing import NamedTuple

import numpy as np
from numba import types
from numba.core.typing import signature

from . import cpu
from .dot import (
    SHORT_COLUMNS,
    begin_short,
    dot4_bytes,
    dot4_short,
    dot4_small,
    end_short,
    short_sums,
    start_bytes,
    start_unsigned,
)
from .formats import BFLOAT16, FLOAT16, FLOAT32, SUPER, bits, has_minimum, high_bits, is_float, is_nested, zero
from .jit import inlined, kernel
from .kinds import BYTES, FLOATS, NUMBER, array, named
from .memory import CACHE_LINE
from .pack import BLOCK, BLOCK_BYTES, COLUMNS, FORMAT, GROUP, OFFSET, header_bytes, unit_bytes
from .simd import (
    add_high,
    bit_pairs,
    f32x16,
    fma,
    high_nibbles,
    i32x16,
    low_nibbles,
    repeat4,
    splat_f32,
    splat_i32,
    tile,
    times,
    to_f32,
    u8x64,
)
from .simd_memory import (
    compiler_barrier,
    load_bf16,
    load_f16,
    load_f32,
    load_i8,
    load_scalar_f32,
    load_u8,
    load_word,
    prefetch,
    prefetch_once,
    prefetch_soon,
    store_f32,
)
from .unit import unit

ZERO = np.float32(0)
# The smallest group, and the most usual one, for which loops are unrolled.
GROUP_MIN, UNROLLED = 16, 32
# The step of `fine`, relative to that of q.
FINE_STEP = np.float32(1 / 256)
# Bytes from what is read to what is prefetched.
AHEAD = 6144
# Rows of the tile for many rows, where the CPU runs it best, and how many such tiles together prefetch the next block.
# Registers hold all its sums, unlike those of 8 rows, but weights are read from the caches more often.
MANY, SHARERS = 5, 4


class Rows(NamedTuple):
    """The inputs of a product, row r from r * stride on (scales and sums: r * stride / GROUP_MIN).

    values: float32, read by floating-point formats. Quantised in groups of the matrix's size: q: int8;
    scales: float32, value = scale * q; sums: int32, minus the sum of each group's q, and offsets: float32,
    scale * sum of q. fine: int16, value = scale * FINE_STEP * fine, read by int8 adapters.
    """

    values: np.ndarray
    q: np.ndarray
    fine: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    offsets: np.ndarray
    stride: int


def _shapes() -> tuple[tuple[int, int], ...]:
    """Tile sizes, largest first: rows, and 1 for half a block at a time or 2 for a whole one.

    One group's integer sums stay in registers; the float32 sums of the largest tile are spilled between groups.
    """
    return ((8, 2), (4, 2), (2, 2), (1, 2)) if cpu.vectors() >= 32 else ((4, 1), (2, 2), (1, 2))


def _prefetcher_of(rows: int):
    """How a tile prefetches: the largest ones compute as long as they read."""
    return prefetch_soon if rows in (MANY, _shapes()[0][0]) else prefetch_once


def _bits_adder(high: int):
    """A kernel that adds the `high` bits above nibbles: step k's and one panel's, of the group with values at `at`."""
    add = add_high.get(high)

    @inlined
    def add_bits(nibbles, weights, at, group, k, panel):
        line = 16 * group + 16 * high * (k & ~3) + 64 * panel * (high - 1)
        return add(nibbles, load_u8(weights, at + line), 2 * (k & 3) + panel * (2 - high))

    return add_bits


def _scale_loader(fmt: int):
    """A kernel that loads 16 scales (which = 0) or minima (1) of a group: those of one panel, as float32.

    units, at: where the record's units and the group's scales lie.
    """
    if is_nested(fmt):

        @inlined
        def load_integers(weights, units, at, which, panel):
            return load_f16(weights, units + 64 * which + 32 * panel) * load_i8(weights, at + 32 * which + 16 * panel)

        return load_integers

    @inlined
    def load_scales(weights, units, at, which, panel):
        return load_f16(weights, at + 64 * which + 32 * panel)

    return load_scales


def _group_opener(fmt: int, fetch):
    """A kernel that steps over the units and scales before the values of group g in a nested format.

    at: where the group begins; units, scales: where its record's units, and the scales of the group before it, lie.
    Returns all three for this group. What lies `ahead` bytes beyond is prefetched.
    """
    header, unit_size = header_bytes(fmt), unit_bytes(fmt)

    @inlined
    def open_group(weights, units, scales, at, g, group, ahead):
        if g * group & SUPER - 1 == 0:
            if ahead > 0:
                for i in range(0, unit_size, 64):
                    fetch(weights, at + ahead + i)
            units, at = at, at + unit_size
        if g * header % CACHE_LINE != 0:
            return units, scales + header, at
        if ahead > 0:
            fetch(weights, at + ahead)
        return units, at, at + CACHE_LINE

    return open_group


def _quantized_tile(rows: int, width: int, fmt: int):
    """rows x 1 block of an integer format; with width 1 the first or second half of its weight rows.

        for each group of columns:
            dots = start                                    (corrects for unsigned weights)
            for each 4 columns: dots += weights . q         (int32, exact)
            acc += dots * weight scale * row scale          (+ weight minimum * row offset)
        out (+)= acc

    The kernel takes `linear`'s arguments and: at: the block's first byte; half: with width 1 which half of the rows,
    0 or 1; ahead: how many bytes beyond what is read it prefetches, 0 for no prefetching: as much as the block takes,
    the tile of MANY one of SHARERS parts of it; columns, group: the matrix's.
    """
    sharers = SHARERS if rows == MANY else 1
    nibbles, high, minimum, nested = 4 <= bits(fmt) < 8, high_bits(fmt), has_minimum(fmt), is_nested(fmt)
    header, inside = header_bytes(fmt), 0 if nested else header_bytes(fmt)
    # inside: from where a group begins to its values. open_group prefetches what nested formats have before them; a
    # share of it is less than a line, as one of other headers is, and is prefetched with its neighbours.
    fetches_headers = not nested and sharers == 1
    # A step's weights are half a line, one or two. Of each two lines of nibbles the second is prefetched first: single
    # rows on Zen 4 are slower at an even stride, perhaps because the hardware prefetcher then joins in.
    step, swapped = 16 * (bits(fmt) - high), int(nibbles)
    if bits(fmt) < 8:
        dot, start_at = dot4_small if high else dot4_short, times[zero(fmt)]
    else:
        dot, start_at = dot4_bytes, start_unsigned if minimum else start_bytes
    short, pairs, add_bits = bits(fmt) <= 4, bits(fmt) == 2, _bits_adder(high)
    # Steps for which a line of high bits lasts; the next one is prefetched halfway.
    at_once, period = SHORT_COLUMNS if short else 0, 4 // max(high, 1)
    fetch, load_scales = _prefetcher_of(rows), _scale_loader(fmt)
    new_acc, new_scale = tile(f32x16, rows, width), tile(f32x16, 2, 2)
    open_group, new_weights = _group_opener(fmt, fetch), tile(u8x64, 2)
    new_dots, new_sums = tile(i32x16, rows, width), tile(short_sums if short else i32x16, rows, width)

    # q, s: where the group's inputs begin, and where its scale, sum and offset lie.
    @kernel
    def quantized_tile(weights, at, half, ahead, columns, group, x, x_row, out, out_at, out_stride, add):
        acc, dots, sums, scale, w = new_acc(), new_dots(), new_sums(), new_scale(), new_weights()
        first, begin, units, scales = half if width == 1 else 0, at, at, at
        q, s, groups_stride = x_row * x.stride, x_row * (x.stride // GROUP_MIN), x.stride // GROUP_MIN
        for m in range(rows):
            for n in range(width):
                acc[m, n] = splat_f32(ZERO)
                prefetch(out, out_at + m * out_stride + 16 * (first + n))
        for g in range(columns // group):
            if nested:
                units, scales, at = open_group(weights, units, scales, at, g, group, ahead if sharers == 1 else 0)
            soon = begin + ahead + (at - begin) // sharers
            if fetches_headers and ahead > 0:
                for i in range(0, header, 64):
                    fetch(weights, soon + i)
            for m in range(rows):
                start = start_at(splat_i32(load_word(x.sums, s + m * groups_stride)))
                for n in range(width):
                    dots[m, n] = start
            # LLVM unrolls loops of known length and reorders their sums. Only MANY rows leave registers for that.
            if rows == MANY:
                parts, steps = group // UNROLLED, UNROLLED // 4
            elif at_once > 0:
                parts, steps = (group + at_once - 1) // at_once, min(group, at_once) // 4
            else:
                parts, steps = 1, group // 4
            for part in range(parts):
                for m in range(rows):
                    for n in range(width):
                        sums[m, n] = begin_short(dots[m, n]) if short else dots[m, n]
                for k in range(part * steps, (part + 1) * steps):
                    if ahead > 0:
                        for i in range(0, step // sharers, 64):
                            fetch(weights, soon + inside // sharers + step // sharers * (k ^ swapped) + i)
                        if high > 0 and k & period - 1 == period // 2:
                            fetch(weights, soon + (inside + 16 * group + 16 * high * (k & -period)) // sharers)
                        if rows != MANY:
                            compiler_barrier()
                    for n in range(width):
                        if nibbles:
                            both = load_u8(weights, at + inside + step * k)
                            w[n] = low_nibbles(both) if first + n == 0 else high_nibbles(both)
                            if high > 0:
                                w[n] = add_bits(w[n], weights, at + inside, group, k, first + n)
                        elif pairs:
                            w[n] = bit_pairs(load_u8(weights, at + 64 * (k // 2)), 4 * (k & 1) + 2 * (first + n))
                        else:
                            w[n] = load_u8(weights, at + inside + step * k + 64 * (first + n))
                    for m in range(rows):
                        a = repeat4(load_word(x.q, q + m * x.stride + 4 * k))
                        for n in range(width):
                            sums[m, n] = dot(sums[m, n], w[n], a)
                for m in range(rows):
                    for n in range(width):
                        dots[m, n] = end_short(dots[m, n], sums[m, n]) if short else sums[m, n]
            for n in range(width):
                scale[n, 0] = load_scales(weights, units, scales if nested else at, 0, first + n)
                if minimum:
                    scale[n, 1] = load_scales(weights, units, scales if nested else at, 1, first + n)
            for m in range(rows):
                row_scale = splat_f32(load_scalar_f32(x.scales, s + m * groups_stride))
                for n in range(width):
                    acc[m, n] = fma(to_f32(dots[m, n]), scale[n, 0] * row_scale, acc[m, n])
                if minimum:
                    row_offset = splat_f32(load_scalar_f32(x.offsets, s + m * groups_stride))
                    for n in range(width):
                        acc[m, n] = fma(scale[n, 1], row_offset, acc[m, n])
            at += inside + (step + 16 * high) * (group // 4)
            q, s = q + group, s + 1
        for m in range(rows):
            for n in range(width):
                to = out_at + m * out_stride + 16 * (first + n)
                store_f32(out, to, acc[m, n] + load_f32(out, to) if add else acc[m, n])

    return quantized_tile


def _float_tile(rows: int, width: int, fmt: int):
    """rows x 1 block of a floating-point format; arguments as in _quantized_tile."""
    load, size = {FLOAT32: (load_f32, 4), FLOAT16: (load_f16, 2), BFLOAT16: (load_bf16, 2)}[fmt]
    fetch, new_acc, new_weights = _prefetcher_of(rows), tile(f32x16, rows, width), tile(f32x16, width)

    @kernel
    def float_tile(weights, at, half, ahead, columns, group, x, x_row, out, out_at, out_stride, add):
        acc, w, first = new_acc(), new_weights(), half if width == 1 else 0
        for m in range(rows):
            for n in range(width):
                acc[m, n] = splat_f32(ZERO)
        for k in range(columns):
            if ahead > 0:
                for i in range(0, BLOCK * size, 64):
                    fetch(weights, at + ahead + i)
                compiler_barrier()
            for n in range(width):
                w[n] = load(weights, at + 16 * size * (first + n))
            for m in range(rows):
                a = splat_f32(load_scalar_f32(x.values, (x_row + m) * x.stride + k))
                for n in range(width):
                    acc[m, n] = fma(w[n], a, acc[m, n])
            at += BLOCK * size
        for m in range(rows):
            for n in range(width):
                to = out_at + m * out_stride + 16 * (first + n)
                store_f32(out, to, acc[m, n] + load_f32(out, to) if add else acc[m, n])

    return float_tile


def _block(fmt: int, shapes: tuple):
    """Some rows x 1 block: tiles of the first shape while they fit, the rest in smaller ones."""
    height, width = shapes[0]
    mine = (_float_tile if is_float(fmt) else _quantized_tile)(height, width, fmt)
    others = _block(fmt, shapes[1:]) if len(shapes) > 1 else None

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


def _whole_block(fmt: int):
    """All rows of a step x 1 block: many rows in tiles of MANY, those left over as in _block."""
    rest = _block(fmt, _shapes())
    if is_float(fmt) or not cpu.full_width():
        return rest
    tile_of_many = _quantized_tile(MANY, 2, fmt)

    @kernel
    def whole_block(weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add):
        m, soon, to = 0, ahead, out_at
        if rows >= SHARERS * MANY and group >= UNROLLED:
            # As many as leave a multiple of 4 rows.
            tiles = (rows - 4 * (-rows % MANY)) // MANY
            for i in range(tiles if tiles >= SHARERS else 0):
                share = ahead + ahead // SHARERS * i if i < SHARERS else 0
                tile_of_many(weights, at, 0, share, columns, group, x, x_row + m, out, to, out_stride, add)
                m, soon, to = m + MANY, 0, to + MANY * out_stride
        if m < rows:
            rest(weights, at, soon, columns, group, x, x_row + m, rows - m, out, to, out_stride, add)

    return whole_block


def _first_of(formats: tuple):
    """A kernel that calls the block kernel of its argument fmt, one of `formats`."""
    first = _whole_block(formats[0])
    if len(formats) == 1:

        @kernel
        def only(fmt, weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add):
            first(weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add)

        return only
    wanted, others = formats[0], _first_of(formats[1:])

    @kernel
    def choose(fmt, weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add):
        if fmt == wanted:
            first(weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add)
        else:
            others(fmt, weights, at, ahead, columns, group, x, x_row, rows, out, out_at, out_stride, add)

    return choose


INPUTS = named(Rows, FLOATS, array(np.int8), array(np.int16), FLOATS, array(np.int32), FLOATS)
_WEIGHTS, _OUT = (BYTES, array(np.int64, 2), NUMBER), (FLOATS, NUMBER, NUMBER, NUMBER)
_LINEAR = signature(types.none, *_WEIGHTS, INPUTS, NUMBER, NUMBER, NUMBER, NUMBER, *_OUT)


@unit(lambda formats: (_LINEAR,))
def make_linear(formats: tuple[int, ...]):
    """`linear` for matrices of these formats and no others."""
    multiply, highest = _first_of(formats), _shapes()[0][0]

    @kernel
    def linear(weights, matrices, matrix, x, x_row, rows, block0, block1, out, out_at, out_stride, add):
        """out[r, c] (+)= sum over k of x[x_row + r, k] * weight[32 * block0 + c, k].

        weights: uint8 arena; matrices: int64 [n, 6], matrix: row in it; x: Rows; rows: how many of them;
        block0, block1: range of the matrix's 32-row blocks; out: float32, row r from out_at + r * out_stride;
        add: 1 adds to what is there, 0 overwrites it.
        """
        fmt, columns, group = matrices[matrix, FORMAT], matrices[matrix, COLUMNS], matrices[matrix, GROUP]
        size = matrices[matrix, BLOCK_BYTES]
        # A single tile streams through memory; several take one block after the other.
        ahead = AHEAD if rows <= highest else size
        at = matrices[matrix, OFFSET] + block0 * size
        for block in range(block0, block1):
            to = out_at + (block - block0) * BLOCK
            multiply(fmt, weights, at, ahead, columns, group, x, x_row, rows, out, to, out_stride, add)
            at += size

    return linear
