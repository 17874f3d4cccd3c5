"""LoRA's second half, tiles of s B: for float32 and float16 adapters in float32, for int8 ones as bytes with wide integers.

Sums run over the rank one by one; those of bytes are exact for 16 ranks, which share a scale.
"""

import numpy as np

from .dot import start_wide, wide_first_unsigned, wide_second_unsigned
from .jit import inlined
from .lora_pack import head_bytes, number_bytes
from .pack import FLOAT16, FLOAT32, INT8, PANEL
from .simd import f32x16, fma, i32x16, repeat4, splat_f32, splat_i32, tile, to_f32, u8x64
from .simd_memory import load_f16, load_f32, load_scalar_f32, load_u8, load_word, prefetch_beside, store_f32
from .wide import MINUS, SCALE, SECOND, SECOND_SUM, join_sums

# Rows, and panels, of a tile.
MOST = 4
# Bytes of an int8 panel's scales, and of four ranks in it.
HEAD = head_bytes(INT8)
STEP = 4 * PANEL * number_bytes(INT8)

ZERO, NOTHING = np.float32(0), np.int32(0)

_LOAD = {FLOAT32: load_f32, FLOAT16: load_f16}


def expand_tile(fmt: int):
    """out[m, p] += sum over r < rank of s[m, column + r] * B[p, r] for 1 to 4 rows and panels of B from byte `at` on.

    Panels of `out` are panel_step apart; meanwhile as many bytes from `ahead` on are asked for.
    """
    return _int8_tile() if fmt == INT8 else _float_tile(fmt)


def _float_tile(fmt: int):
    load, size = _LOAD[fmt], number_bytes(fmt)
    new_acc, new_b = tile(f32x16, MOST, MOST), tile(f32x16, MOST)

    @inlined
    def expand_floats(
        rows, panels, arena, at, ahead, rank, s, s_at, column, s_stride, out, out_at, out_stride, panel_step
    ):
        acc, b, panel = new_acc(), new_b(), rank * PANEL * size
        for i in range(0, panels * panel, 64):
            prefetch_beside(arena, ahead + i)
        for p in range(panels):
            for m in range(rows):
                acc[m, p] = splat_f32(ZERO)
        for r in range(rank):
            for p in range(panels):
                b[p] = load(arena, at + p * panel + r * PANEL * size)
            for m in range(rows):
                x = splat_f32(load_scalar_f32(s, s_at + m * s_stride + column + r))
                for p in range(panels):
                    acc[m, p] = fma(b[p], x, acc[m, p])
        for m in range(rows):
            for p in range(panels):
                to = out_at + m * out_stride + p * panel_step
                store_f32(out, to, load_f32(out, to) + acc[m, p])

    return expand_floats


def _int8_tile():
    new_acc, new_dots, new_b = tile(f32x16, MOST, MOST), tile(i32x16, 2 * MOST, MOST), tile(u8x64, MOST)
    new_minus = tile(i32x16, MOST)

    @inlined
    def expand_int8(
        rows, panels, arena, at, ahead, rank, s, s_at, column, s_stride, out, out_at, out_stride, panel_step
    ):
        acc, dots, b, minus = new_acc(), new_dots(), new_b(), new_minus()
        panel, first = HEAD + rank * PANEL, column // 4
        word, end = first, first + rank // 4
        for i in range(0, panels * panel, 64):
            prefetch_beside(arena, ahead + i)
        for m in range(rows):
            for p in range(panels):
                acc[m, p] = splat_f32(ZERO)
        while word < end:
            # As many words as share a scale.
            here, stop = s_at + word // 4 * PANEL, min(end, (word // 4 + 1) * 4)
            for m in range(rows):
                minus[m] = splat_i32(NOTHING)
                for p in range(panels):
                    dots[2 * m, p] = splat_i32(NOTHING)
                    dots[2 * m + 1, p] = splat_i32(NOTHING)
            for w in range(word, stop):
                for p in range(panels):
                    b[p] = load_u8(arena, at + HEAD + p * panel + (w - first) * STEP)
                for m in range(rows):
                    v, n = here + m * s_stride + w % 4, 2 * m + SECOND_SUM
                    first_s, second_s = repeat4(load_word(s, v)), repeat4(load_word(s, v + SECOND))
                    minus[m] = minus[m] + splat_i32(load_word(s, v + MINUS))
                    for p in range(panels):
                        dots[2 * m, p] = wide_first_unsigned(dots[2 * m, p], b[p], first_s)
                        dots[n, p] = wide_second_unsigned(dots[n, p], b[p], second_s)
            for m in range(rows):
                scale = splat_f32(load_scalar_f32(s, here + m * s_stride + SCALE))
                for p in range(panels):
                    total = join_sums(dots[2 * m, p], dots[2 * m + SECOND_SUM, p]) + start_wide(minus[m])
                    acc[m, p] = fma(to_f32(total), scale, acc[m, p])
            word = stop
        for p in range(panels):
            lanes = load_f32(arena, at + p * panel)
            for m in range(rows):
                to = out_at + m * out_stride + p * panel_step
                store_f32(out, to, fma(acc[m, p], lanes, load_f32(out, to)))

    return expand_int8
