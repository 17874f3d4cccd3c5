"""LoRA's second half, rows of s B: in float32 for float adapters, as products of bytes and wide integers for int8 ones.

Sums of floats run over the rank one by one; those of bytes are exact for 16 ranks, which share a scale.
"""

from typing import NamedTuple

import numpy as np

from . import cpu
from .dot import start_wide, wide_first_unsigned, wide_second_unsigned
from .formats import FLOAT16, FLOAT32, INT8
from .jit import inlined, kernel
from .lora_pack import head_bytes, number_bytes
from .memory import CACHE_LINE
from .pack import PANEL
from .simd import f32x16, fma, i32x16, repeat4, splat_f32, splat_i32, tile, to_f32, u8x64
from .simd_memory import (
    compiler_barrier,
    load_f16,
    load_f32,
    load_scalar_f32,
    load_u8,
    load_word,
    prefetch_soon,
    store_f32,
)
from .wide import MINUS, SCALE, SECOND, SECOND_SUM, join_sums

# Most rows of a tile.
ROWS = 4
# Bytes of an int8 panel's scales, and of four ranks in it; how many words of four ranks share a scale.
HEAD = head_bytes(INT8)
STEP = 4 * PANEL * number_bytes(INT8)
WORDS = PANEL // 4

ZERO, NOTHING = np.float32(0), np.int32(0)

_LOAD = {FLOAT32: load_f32, FLOAT16: load_f16}


class Panels(NamedTuple):
    """`number` panels of B of `size` bytes, from byte `at` on; those `ahead` bytes on are prefetched if it is not 0."""

    arena: np.ndarray
    at: int
    number: int
    size: int
    ahead: int


class Place(NamedTuple):
    """Rows of float32 `stride` apart, the first from `at` on; the panels of each are `step` apart."""

    array: np.ndarray
    at: int
    stride: int
    step: int


@kernel
def row_of(place, m):
    """The Place of its rows from m on."""
    return Place(place.array, place.at + m * place.stride, place.stride, place.step)


def rows_at_once(fmt: int) -> int:
    """How many rows are best taken together: for int8 adapters as many as have their words in registers."""
    if fmt == INT8:
        return 2 if cpu.vectors() >= 32 else 1
    return ROWS


def expand_rows(fmt: int):
    """out[m, p] += sum over r < rank of s[m, column + r] * B[p, r] for 1 or rows_at_once(fmt) rows and all panels p."""
    return _int8_rows() if fmt == INT8 else _float_rows(fmt)


def _float_rows(fmt: int):
    load, numbers = _LOAD[fmt], PANEL * number_bytes(fmt)
    # Panels at a time, for several rows and for one.
    broad, wide = (2, 4) if cpu.vectors() >= 32 else (1, 2)
    new_acc, new_b = tile(f32x16, ROWS, wide), tile(f32x16, wide)

    @inlined
    def expand_some(rows, panels, b, first, rank, s, column, out):
        acc, numbers_of, at, to = new_acc(), new_b(), b.at + first * b.size, out.at + first * out.step
        for p in range(panels):
            for m in range(rows):
                acc[m, p] = splat_f32(ZERO)
        for r in range(rank):
            for p in range(panels):
                place = at + p * b.size + r * numbers
                if b.ahead != 0 and r * numbers % CACHE_LINE == 0:
                    prefetch_soon(b.arena, place + b.ahead)
                numbers_of[p] = load(b.arena, place)
            for m in range(rows):
                x = splat_f32(load_scalar_f32(s.array, s.at + m * s.stride + column + r))
                for p in range(panels):
                    acc[m, p] = fma(numbers_of[p], x, acc[m, p])
            compiler_barrier()
        for m in range(rows):
            for p in range(panels):
                place = to + m * out.stride + p * out.step
                store_f32(out.array, place, load_f32(out.array, place) + acc[m, p])

    @inlined
    def expand_floats(rows, b, rank, s, column, out):
        most, p = wide if rows == 1 else broad, 0
        while p + most <= b.number:
            expand_some(rows, most, b, p, rank, s, column, out)
            p += most
        while p < b.number:
            expand_some(rows, 1, b, p, rank, s, column, out)
            p += 1

    return expand_floats


def _int8_rows():
    new_words, new_dots = tile(u8x64, ROWS, 2 * WORDS), tile(i32x16, ROWS, 2)
    new_starts, new_scales = tile(i32x16, ROWS), tile(f32x16, ROWS)

    @inlined
    def expand_words(rows, count, b, first, group, word, out):
        """Add what `count` words of 16 numbers give, from `word` on; B's begin at byte `first` of each panel.

        The words stay in registers for all panels.
        """
        words, dots, starts, scales, at, to = new_words(), new_dots(), new_starts(), new_scales(), b.at, out.at
        for m in range(rows):
            s, minus = group.at + m * group.stride, splat_i32(NOTHING)
            for w in range(count):
                words[m, w] = repeat4(load_word(group.array, s + word + w))
                words[m, WORDS + w] = repeat4(load_word(group.array, s + SECOND + word + w))
                minus = minus + splat_i32(load_word(group.array, s + MINUS + word + w))
            starts[m], scales[m] = start_wide(minus), splat_f32(load_scalar_f32(group.array, s + SCALE))
        for _ in range(b.number):
            if b.ahead != 0:
                prefetch_soon(b.arena, at + b.ahead)
            for m in range(rows):
                dots[m, 0], dots[m, 1] = splat_i32(NOTHING), splat_i32(NOTHING)
            for w in range(count):
                place = at + first + w * STEP
                if b.ahead != 0:
                    prefetch_soon(b.arena, place + b.ahead)
                four = load_u8(b.arena, place)
                for m in range(rows):
                    dots[m, 0] = wide_first_unsigned(dots[m, 0], four, words[m, w])
                    dots[m, SECOND_SUM] = wide_second_unsigned(dots[m, SECOND_SUM], four, words[m, WORDS + w])
                compiler_barrier()
            lanes = load_f32(b.arena, at)
            for m in range(rows):
                place, total = to + m * out.stride, join_sums(dots[m, 0], dots[m, SECOND_SUM]) + starts[m]
                store_f32(out.array, place, fma(to_f32(total) * scales[m], lanes, load_f32(out.array, place)))
            at, to = at + b.size, to + out.step

    @inlined
    def expand_int8(rows, b, rank, s, column, out):
        word, end, first = column // 4, (column + rank) // 4, HEAD
        while word < end:
            group, at = Place(s.array, s.at + word // WORDS * PANEL, s.stride, s.step), word % WORDS
            count = min(end - word, WORDS - at)
            if count == 4:
                expand_words(rows, 4, b, first, group, at, out)
            elif count == 3:
                expand_words(rows, 3, b, first, group, at, out)
            elif count == 2:
                expand_words(rows, 2, b, first, group, at, out)
            else:
                expand_words(rows, 1, b, first, group, at, out)
            word, first = word + count, first + count * STEP

    return expand_int8
