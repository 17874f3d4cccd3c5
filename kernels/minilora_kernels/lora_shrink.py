"""LoRA's first half, tiles of x A: of float32 and float16 adapters in float32, of int8 ones in integers.

Sums of floats run over k in four interleaved chains, those of integers are exact within a group of inputs and run over
the groups in order. The results are float32 numbers, or wide integers for int8 adapters, as `lora_expand` reads them.
"""

import numpy as np

from . import cpu
from .dot import dot2
from .formats import FLOAT16, FLOAT32, INT8
from .inputs import FINE_STEP, GROUP_MIN
from .jit import inlined, kernel
from .lora_pack import head_bytes, number_bytes
from .pack import PANEL
from .simd import f32x16, fma, i32x16, repeat2, splat_f32, splat_i32, tile, to_f32
from .simd_memory import (
    compiler_barrier,
    load_f16,
    load_f32,
    load_i8,
    load_i16_of_i8,
    load_scalar_f32,
    load_word,
    prefetch_soon,
    store_f32,
)
from .wide import store_sixteen

# Rows of the tile for several; int8 adapters also have one of twice as many, where registers hold its sums.
TILE_ROWS = 4
# Sums for each row of float adapters; columns that int8 adapters take at a time.
CHAINS, PART = 4, 16
# Prefetch distances in bytes. int8 adapters prefetch a line a second time, AGAIN bytes ahead, as a core drops
# prefetches while its miss buffers are full. The second one may run past the panel: a check would cost more.
AHEAD, AGAIN = 8192, 3072

ZERO, NOTHING = np.float32(0), np.int32(0)

_LOAD = {FLOAT32: load_f32, FLOAT16: load_f16, INT8: load_i8}


def most_rows(fmt: int) -> int:
    """Rows of the largest tile."""
    return 2 * TILE_ROWS if fmt == INT8 and cpu.vectors() >= 32 else TILE_ROWS


def shrink_tile(fmt: int):
    """s[m] = scale * sum over k of x[m, k] * A[k] for some rows m of x, from x_row on, and the panel of A at byte `at`.

    x, group, s, following: as make_lora's shrink has them.
    """
    return _int8_tile() if fmt == INT8 else _float_tile(fmt)


def _float_tile(fmt: int):
    load, size = _LOAD[fmt], number_bytes(fmt)
    new_acc, new_a = tile(f32x16, TILE_ROWS, CHAINS), tile(f32x16, CHAINS)

    @inlined
    def shrink_floats(rows, arena, at, following, columns, group, x, x_row, scale, s, s_at, s_stride):
        acc, a, lanes, length, x_at = new_acc(), new_a(), splat_f32(scale), columns * PANEL * size, x_row * x.stride
        for m in range(rows):
            for c in range(CHAINS):
                acc[m, c] = splat_f32(ZERO)
        for k in range(0, columns, CHAINS):
            for i in range(0, CHAINS * PANEL * size, 64):
                ahead = k * PANEL * size + AHEAD + i
                prefetch_soon(arena, at + ahead if ahead < length else following + ahead - length)
            for c in range(CHAINS):
                a[c] = load(arena, at + (k + c) * PANEL * size)
            for m in range(rows):
                for c in range(CHAINS):
                    number = load_scalar_f32(x.values, x_at + m * x.stride + k + c)
                    acc[m, c] = fma(a[c], splat_f32(number), acc[m, c])
            compiler_barrier()
        for m in range(rows):
            total = (acc[m, 0] + acc[m, 1]) + (acc[m, 2] + acc[m, 3])
            store_f32(s, s_at + m * s_stride, total * lanes)

    return shrink_floats


def _int8_tile():
    most, head = most_rows(INT8), head_bytes(INT8)
    new_acc, new_dots = tile(f32x16, most), tile(i32x16, most)

    @inlined
    def shrink_int8(rows, arena, at, following, columns, group, x, x_row, scale, s, s_at, s_stride):
        acc, dots, length = new_acc(), new_dots(), columns * PANEL
        lanes, at = splat_f32(scale * FINE_STEP) * load_f32(arena, at), at + head
        x_at, scale_stride = x_row * x.stride, x.stride // GROUP_MIN
        scale_at = x_row * scale_stride
        for m in range(rows):
            acc[m] = splat_f32(ZERO)
        for first in range(0, columns, group):
            for m in range(rows):
                dots[m] = splat_i32(NOTHING)
            for part in range(first, min(first + group, columns), PART):
                ahead = part * PANEL + AHEAD
                soon = at + ahead if ahead < length else following + ahead - length
                place = at + part * PANEL
                for k in range(0, PART, 2):
                    # A cache line holds four columns.
                    if k % 4 == 0:
                        prefetch_soon(arena, soon + k * PANEL)
                    else:
                        prefetch_soon(arena, place + AGAIN + (k - 2) * PANEL)
                    a = load_i16_of_i8(arena, place + k * PANEL)
                    for m in range(rows):
                        two = load_word(x.fine, x_at + m * x.stride + part + k)
                        dots[m] = dot2(dots[m], a, repeat2(two))
                    compiler_barrier()
            for m in range(rows):
                row_scale = splat_f32(load_scalar_f32(x.scales, scale_at + m * scale_stride))
                acc[m] = fma(to_f32(dots[m]), row_scale, acc[m])
            scale_at += 1
        for m in range(rows):
            store_sixteen(s, s_at + m * s_stride, acc[m] * lanes)

    return shrink_int8


def gather_panel(fmt: int):
    """s = scale * column `token` of the panel of A at byte `at`."""
    load, size, quantized = _LOAD[fmt], number_bytes(fmt), fmt == INT8
    head, store = head_bytes(fmt), store_sixteen if quantized else store_f32

    @kernel
    def gather(arena, at, token, scale, s, s_at):
        lanes = splat_f32(scale)
        if quantized:
            lanes = lanes * load_f32(arena, at)
            at += head
        store(s, s_at, load(arena, at + token * PANEL * size) * lanes)

    return gather
