"""Tiles of products whose weights are floating-point numbers."""

import numpy as np

from .dot import dot2_bf16
from .formats import FLOAT32
from .jit import kernel
from .linear_shapes import prefetcher_of
from .pack import BLOCK
from .simd import even_bf16, f32x16, fma, i16x32, odd_bf16, repeat2, splat_f32, tile
from .simd_memory import compiler_barrier, load_f16, load_f32, load_i16, load_scalar_f32, load_word, store_f32

ZERO = np.float32(0)


def make_float_tile(rows: int, width: int, fmt: int):
    """rows x 1 block of float32 or float16, column by column; arguments as in make_quantized_tile."""
    load, size = (load_f32, 4) if fmt == FLOAT32 else (load_f16, 2)
    fetch, new_acc, new_weights = prefetcher_of(rows), tile(f32x16, rows, width), tile(f32x16, width)

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


def make_pair_tile(rows: int, width: int, rounds: bool):
    """rows x 1 block of bfloat16, two columns at a time; arguments likewise. rounds: inputs are bfloat16, too."""
    fetch, new_acc, new_weights = prefetcher_of(rows), tile(f32x16, rows, width), tile(i16x32, width)

    @kernel
    def pair_tile(weights, at, half, ahead, columns, group, x, x_row, out, out_at, out_stride, add):
        acc, w, first = new_acc(), new_weights(), half if width == 1 else 0
        for m in range(rows):
            for n in range(width):
                acc[m, n] = splat_f32(ZERO)
        for k in range(0, columns, 2):
            if ahead > 0:
                for i in range(0, 4 * BLOCK, 64):
                    fetch(weights, at + ahead + i)
                compiler_barrier()
            for n in range(width):
                w[n] = load_i16(weights, at + 64 * (first + n))
            for m in range(rows):
                place = (x_row + m) * x.stride + k
                if rounds:
                    pair = repeat2(load_word(x.rounded, place))
                    for n in range(width):
                        acc[m, n] = dot2_bf16(acc[m, n], w[n], pair)
                else:
                    a, b = splat_f32(load_scalar_f32(x.values, place)), splat_f32(load_scalar_f32(x.values, place + 1))
                    for n in range(width):
                        acc[m, n] = fma(odd_bf16(w[n]), b, fma(even_bf16(w[n]), a, acc[m, n]))
            at += 4 * BLOCK
        for m in range(rows):
            for n in range(width):
                to = out_at + m * out_stride + 16 * (first + n)
                store_f32(out, to, acc[m, n] + load_f32(out, to) if add else acc[m, n])

    return pair_tile
