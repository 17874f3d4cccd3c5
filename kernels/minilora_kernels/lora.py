"""Segmented LoRA: y += (x A) B for runs of rows that share an adapter, never merged into the base weights.

All matrices of an adapter that read the same input are shrunk at once: A is stored transposed as
[R / 16 panels][K][16] with the ranks of those matrices side by side (R: their sum, padded to 16). B of each
matrix is stored as [N / 16 panels][rank][16], alpha / rank folded in. Both lie in a uint8 arena as float32, float16
or int8; a panel of int8 begins with 16 float32 scales, one for each of its 16 rows of A or B. Sums run in a fixed
order: over k in four interleaved chains, over the rank one by one.
"""

from functools import cache

import numpy as np

from .convert import narrow_float16, quantize_panels_int8
from .jit import kernel
from .pack import FLOAT16, FLOAT32, INT8, PANEL
from .simd import f32x16, fma, load_f16, load_f32, load_i8, load_scalar_f32, prefetch_beside, splat_f32, store_f32, tile

CHAINS = 4
# How far ahead of its use memory is asked for: bytes of A, panels of B.
AHEAD = 8192
PANELS_AHEAD = 8

ZERO, ONE = np.float32(0), np.float32(1)


def pack_shrink(parts: list[np.ndarray]) -> np.ndarray:
    """Panels of A [R, K], flat: the parts below each other, padded to a multiple of 16 rows with zeros."""
    rows, columns = sum(map(len, parts)), parts[0].shape[1]
    panels = np.zeros((-(-rows // PANEL), columns, PANEL), np.float32)
    at = 0
    for part in parts:
        done = 0
        while done < len(part):
            lane = at % PANEL
            count = min(PANEL - lane, len(part) - done)
            panels[at // PANEL, :, lane : lane + count] = part[done : done + count].T
            at, done = at + count, done + count
    return panels.reshape(-1)


def pack_expand(b: np.ndarray) -> np.ndarray:
    """Panels of B [N, rank], alpha / rank folded in, flat; N is a multiple of 16."""
    return np.ascontiguousarray(b.reshape(-1, PANEL, b.shape[1]).transpose(0, 2, 1), np.float32).reshape(-1)


def panel_bytes(inner: int, fmt: int) -> int:
    """Bytes of a panel of 16 rows of `inner` numbers each."""
    return _head(fmt) + inner * PANEL * _size(fmt)


def pack_numbers(panels: np.ndarray, inner: int, fmt: int, out: np.ndarray, at: int) -> int:
    """Write flat float32 panels of `inner` x 16 numbers as fmt from byte `at` of out; returns the byte after them.

    Raises OverflowError where a number is too large for float16.
    """
    end = at + len(panels) // (inner * PANEL) * panel_bytes(inner, fmt)
    if fmt == INT8:
        quantize_panels_int8(panels, inner, out, at)
    elif fmt == FLOAT16:
        narrow_float16(panels, out.view(np.uint16), at // 2)
    else:
        out[at:end] = panels.view(np.uint8)
    return end


def _head(fmt: int) -> int:
    return 4 * PANEL if fmt == INT8 else 0


def _size(fmt: int) -> int:
    return {FLOAT32: 4, FLOAT16: 2, INT8: 1}[fmt]


def _shrink_tile(rows: int, fmt: int):
    load, size, head, scaled = _loader(fmt), _size(fmt), _head(fmt), fmt == INT8
    new_acc, new_a = tile(f32x16, rows, CHAINS), tile(f32x16, CHAINS)

    @kernel
    def multiply(arena, at, following, columns, x, x_at, x_stride, scale, s, s_at, s_stride):
        acc, a, lanes, length = new_acc(), new_a(), splat_f32(scale), columns * PANEL * size
        if scaled:
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
            store_f32(s, s_at + m * s_stride, total * lanes)

    return multiply


def _expand_tile(rows: int, panels: int, fmt: int):
    load, size, head, scaled = _loader(fmt), _size(fmt), _head(fmt), fmt == INT8
    new_acc, new_b, new_lanes = tile(f32x16, rows, panels), tile(f32x16, panels), tile(f32x16, panels)

    @kernel
    def multiply(arena, at, ahead, rank, s, s_at, s_stride, out, out_at, out_stride, panel_step):
        acc, b, lanes, panel = new_acc(), new_b(), new_lanes(), head + rank * PANEL * size
        for i in range(0, panels * panel, 64):
            prefetch_beside(arena, ahead + i)
        for p in range(panels):
            if scaled:
                lanes[p] = load_f32(arena, at + p * panel)
            for m in range(rows):
                acc[m, p] = splat_f32(ZERO)
        at += head
        for r in range(rank):
            for p in range(panels):
                b[p] = load(arena, at + p * panel + r * PANEL * size)
            for m in range(rows):
                x = splat_f32(load_scalar_f32(s, s_at + m * s_stride + r))
                for p in range(panels):
                    acc[m, p] = fma(b[p], x, acc[m, p])
        for m in range(rows):
            for p in range(panels):
                to = out_at + m * out_stride + p * panel_step
                if scaled:
                    store_f32(out, to, fma(acc[m, p], lanes[p], load_f32(out, to)))
                else:
                    store_f32(out, to, load_f32(out, to) + acc[m, p])

    return multiply


def _loader(fmt: int):
    return {FLOAT32: load_f32, FLOAT16: load_f16, INT8: load_i8}[fmt]


@cache
def make_lora(fmt: int):
    """(shrink, gather, expand) for adapters stored as FLOAT32, FLOAT16 or INT8."""
    shrink4, shrink1 = _shrink_tile(4, fmt), _shrink_tile(1, fmt)
    expand4, expand1, expand1x2 = _expand_tile(4, 1, fmt), _expand_tile(1, 1, fmt), _expand_tile(1, 2, fmt)
    load, size, head, scaled = _loader(fmt), _size(fmt), _head(fmt), fmt == INT8

    @kernel
    def shrink(arena, at, following, columns, panel, x, x_at, x_stride, rows, scale, s, s_at, s_stride):
        """s[m, 16 * panel + i] = scale * sum over k of x[m, k] * A[16 * panel + i, k], m < rows, i < 16.

        arena: uint8, A's panels from byte `at`; columns: K, a multiple of 4; x, s: float32, row m at m * stride.
        following: the byte that is likely to be read after this panel, for prefetching.
        """
        at += panel * (head + columns * PANEL * size)
        s_at += panel * PANEL
        m = 0
        while rows - m >= 4:
            x_m, s_m = x_at + m * x_stride, s_at + m * s_stride
            shrink4(arena, at, following, columns, x, x_m, x_stride, scale, s, s_m, s_stride)
            m += 4
        while m < rows:
            x_m, s_m = x_at + m * x_stride, s_at + m * s_stride
            shrink1(arena, at, following, columns, x, x_m, x_stride, scale, s, s_m, s_stride)
            m += 1

    @kernel
    def gather(arena, at, columns, panels, token, scale, s, s_at):
        """s[i] = scale * A[i, token], i < 16 * panels: shrink for an embedding, whose input is a token number.

        arena: uint8, A's panels from byte `at`; columns: the vocabulary's size.
        """
        for panel in range(panels):
            lanes = splat_f32(scale)
            if scaled:
                lanes = lanes * load_f32(arena, at)
            store_f32(s, s_at + panel * PANEL, load(arena, at + head + token * PANEL * size) * lanes)
            at += head + columns * PANEL * size

    @kernel
    def expand(
        arena, at, rank, panel0, panel1, following, s, s_at, s_stride, rows, out, out_at, out_stride, panel_step
    ):
        """out[m, panel p] += sum over r < rank of s[m, r] * B[p, r], m < rows, panel0 <= p < panel1.

        arena: uint8, B's panels from byte `at`; s, out: float32, row m at m * stride; panel p is the 16 numbers
        at out_at + (p - panel0) * panel_step: 16, or 32 where two matrices are interleaved. following: the byte
        that is likely to be read after these panels, for prefetching.
        """
        panel = head + rank * PANEL * size
        p = panel0
        while p < panel1:
            here, to = at + p * panel, out_at + (p - panel0) * panel_step
            ahead = here + PANELS_AHEAD * panel
            if p + PANELS_AHEAD >= panel1:
                ahead = following + (p + PANELS_AHEAD - panel1) * panel
            if rows == 1 and p + 1 < panel1:
                expand1x2(arena, here, ahead, rank, s, s_at, s_stride, out, to, out_stride, panel_step)
                p += 2
                continue
            m = 0
            while rows - m >= 4:
                s_m, to_m = s_at + m * s_stride, to + m * out_stride
                expand4(arena, here, ahead, rank, s, s_m, s_stride, out, to_m, out_stride, panel_step)
                m += 4
            while m < rows:
                s_m, to_m = s_at + m * s_stride, to + m * out_stride
                expand1(arena, here, ahead, rank, s, s_m, s_stride, out, to_m, out_stride, panel_step)
                m += 1
            p += 1

    return shrink, gather, expand
