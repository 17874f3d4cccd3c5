"""Tiles of products whose weights are integers in groups, and blocks unpacked for many such tiles.

An unpacked block is like one of int8, see `pack`, but its scales and minima are float32, and the value that stands for
0 is its format's.
"""

import numpy as np

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
from .formats import SUPER, bits, has_minimum, high_bits, is_nested, zero
from .inputs import GROUP_MIN, UNROLLED
from .jit import inlined, kernel
from .linear_shapes import AHEAD, MANY, SHARERS, prefetcher_of
from .memory import CACHE_LINE
from .pack import BLOCK, header_bytes, unit_bytes
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
    load_f16,
    load_f32,
    load_i8,
    load_scalar_f32,
    load_u8,
    load_word,
    prefetch,
    prefetch_once,
    store_f32,
    store_u8,
)

ZERO = np.float32(0)


def _bits_adder(high: int):
    """A kernel that adds the `high` bits above nibbles: step k's and one panel's, of the group with values at `at`."""
    add = add_high.get(high)

    @inlined
    def add_bits(nibbles, weights, at, group, k, panel):
        line = 16 * group + 16 * high * (k & ~3) + 64 * panel * (high - 1)
        return add(nibbles, load_u8(weights, at + line), 2 * (k & 3) + panel * (2 - high))

    return add_bits


def _scale_loader(fmt: int, unpacked: bool = False):
    """A kernel that loads 16 scales (which = 0) or minima (1) of a group: those of one panel, as float32.

    units, at: where the record's units and the group's scales lie.
    """
    if unpacked:

        @inlined
        def load_floats(weights, units, at, which, panel):
            return load_f32(weights, at + 128 * which + 64 * panel)

        return load_floats
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


def unpacked_header(fmt: int) -> int:
    """Bytes of a group's scales and minima in an unpacked block: float32."""
    return 4 * BLOCK * (2 if has_minimum(fmt) else 1)


def unpacked_bytes(fmt: int, columns: int, group: int) -> int:
    """Bytes of one unpacked block."""
    return columns // group * unpacked_header(fmt) + BLOCK * columns


def make_unpack(fmt: int):
    """A kernel that unpacks a block of a format of less than 8 bits.

    columns, group: the matrix's; room: uint8, unpacked_bytes of it from room_at on are written.
    """
    inside, nested = 0 if is_nested(fmt) else header_bytes(fmt), is_nested(fmt)
    high, pairs, kinds = high_bits(fmt), bits(fmt) == 2, 2 if has_minimum(fmt) else 1
    step = 16 * (bits(fmt) - high)
    load_scales, open_group, add_bits = _scale_loader(fmt), _group_opener(fmt, prefetch_once), _bits_adder(high)

    @kernel
    def unpack(weights, at, columns, group, room, room_at):
        units, scales = at, at
        for g in range(columns // group):
            if nested:
                units, scales, at = open_group(weights, units, scales, at, g, group, 0)
            for which in range(kinds):
                for panel in range(2):
                    numbers = load_scales(weights, units, scales if nested else at, which, panel)
                    store_f32(room, room_at + 128 * which + 64 * panel, numbers)
            room_at += 128 * kinds
            for k in range(group // 4):
                prefetch_once(weights, at + AHEAD + step * k)
                if high > 0:
                    prefetch_once(weights, at + AHEAD + inside + 16 * group + 16 * high * k)
                both = load_u8(weights, at + (64 * (k // 2) if pairs else inside + step * k))
                for panel in range(2):
                    if pairs:
                        w = bit_pairs(both, 4 * (k & 1) + 2 * panel)
                    else:
                        w = low_nibbles(both) if panel == 0 else high_nibbles(both)
                    if high > 0:
                        w = add_bits(w, weights, at + inside, group, k, panel)
                    store_u8(room, room_at, w)
                    room_at += 64
            at += inside + (step + 16 * high) * (group // 4)

    return unpack


def make_quantized_tile(rows: int, width: int, fmt: int, unpacked: bool = False):
    """rows x 1 block of an integer format; with width 1 the first or second half of its weight rows.

        for each group of columns:
            dots = start                                    (corrects for unsigned weights)
            for each 4 columns: dots += weights . q         (int32, exact)
            acc += dots * weight scale * row scale          (+ weight minimum * row offset)
        out (+)= acc

    The kernel takes `linear`'s arguments and: at: the block's first byte; half: with width 1 which half of the rows,
    0 or 1; ahead: how many bytes beyond what is read it prefetches, 0 for no prefetching: as much as the block takes,
    the tile of MANY one of SHARERS parts of it; columns, group: the matrix's. unpacked: the block is as make_unpack
    left it.
    """
    sharers, width_of_value = SHARERS if rows == MANY else 1, 8 if unpacked else bits(fmt)
    minimum, nested, high = has_minimum(fmt), is_nested(fmt) and not unpacked, 0 if unpacked else high_bits(fmt)
    nibbles, header = 4 <= width_of_value < 8, unpacked_header(fmt) if unpacked else header_bytes(fmt)
    inside = 0 if nested else header
    # inside: from where a group begins to its values. open_group prefetches what nested formats have before them; a
    # share of it is less than a line, as one of other headers is, and is prefetched with its neighbours.
    fetches_headers = not nested and sharers == 1
    # A step's weights are half a line, one or two. Of each two lines of nibbles the second is prefetched first: single
    # rows on Zen 4 are slower at an even stride, perhaps because the hardware prefetcher then joins in.
    step, swapped = 16 * (width_of_value - high), int(nibbles)
    if bits(fmt) < 8:
        dot, start_at = dot4_short if bits(fmt) <= 4 else dot4_small, times[zero(fmt)]
    else:
        dot, start_at = dot4_bytes, start_unsigned if minimum else start_bytes
    short, pairs, add_bits = bits(fmt) <= 4, width_of_value == 2, _bits_adder(high)
    # Steps for which a line of high bits lasts; the next one is prefetched halfway.
    at_once, period = SHORT_COLUMNS if short else 0, 4 // max(high, 1)
    fetch, load_scales = prefetcher_of(rows), _scale_loader(fmt, unpacked)
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
