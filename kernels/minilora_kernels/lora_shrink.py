"""LoRA's first half, tiles of x A: numbers of every format, widened to float32.

Sums run over k in four interleaved chains. What comes out are float32 numbers, or for int8 adapters wide integers, as
`lora_expand` reads them.
"""

import numpy as np

from .jit import inlined, kernel
from .lora_pack import head_bytes, number_bytes
from .pack import FLOAT16, FLOAT32, INT8, PANEL
from .simd import f32x16, fma, splat_f32, tile
from .simd_memory import load_f16, load_f32, load_i8, load_scalar_f32, prefetch_beside, store_f32
from .wide import store_sixteen

MOST_ROWS, CHAINS = 4, 4
# How far ahead of its use memory is asked for, in bytes.
AHEAD = 8192

ZERO = np.float32(0)

_LOAD = {FLOAT32: load_f32, FLOAT16: load_f16, INT8: load_i8}


def shrink_tile(fmt: int):
    """s[m] = scale * sum over k of x[m, k] * A[k] for 1 to 4 rows and the panel of A at byte `at`.

    following: the byte that is likely to be read after this panel, for prefetching.
    """
    load, size, quantized = _LOAD[fmt], number_bytes(fmt), fmt == INT8
    new_acc, new_a, head = tile(f32x16, MOST_ROWS, CHAINS), tile(f32x16, CHAINS), head_bytes(fmt)
    store = store_sixteen if quantized else store_f32

    @inlined
    def shrink(rows, arena, at, following, columns, x, x_at, x_stride, scale, s, s_at, s_stride):
        acc, a, lanes, length = new_acc(), new_a(), splat_f32(scale), columns * PANEL * size
        if quantized:
            lanes = lanes * load_f32(arena, at)
            at += head
        for m in range(rows):
            for c in range(CHAINS):
                acc[m, c] = splat_f32(ZERO)
        for k in range(0, columns, CHAINS):
            for i in range(0, CHAINS * PANEL * size, 64):
                ahead = k * PANEL * size + AHEAD + i
                prefetch_beside(arena, at + ahead if ahead < length else following + ahead - length)
            for c in range(CHAINS):
                a[c] = load(arena, at + (k + c) * PANEL * size)
            for m in range(rows):
                for c in range(CHAINS):
                    acc[m, c] = fma(a[c], splat_f32(load_scalar_f32(x, x_at + m * x_stride + k + c)), acc[m, c])
        for m in range(rows):
            total = (acc[m, 0] + acc[m, 1]) + (acc[m, 2] + acc[m, 3])
            store(s, s_at + m * s_stride, total * lanes)

    return shrink


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
