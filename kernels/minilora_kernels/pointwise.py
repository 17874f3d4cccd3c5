"""Kernels for one row at a time: embedding, norm, rotation, gating.

Row lengths are multiples of 16. Offsets count elements; in the arena, bytes.
"""

import numpy as np

from .formats import FLOAT16, FLOAT32, FORMAT_NAMES, SUPER, bits, has_minimum, high_bits, zero
from .jit import inlined, kernel
from .memory import CACHE_LINE
from .pack import BLOCK, BLOCK_BYTES, COLUMNS, FORMAT, GROUP, OFFSET, PANEL, header_bytes, unit_bytes
from .simd import exp, f32x16, fma, splat_f32, tile, vmin
from .simd_lanes import hsum
from .simd_memory import load_f32, load_scalar_bf16, load_scalar_f16, load_scalar_f32, store_f32

ZERO, ONE = np.float32(0), np.float32(1)
# The largest argument that exp takes.
MOST = np.float32(88)
# What embed must know of each format.
WIDTHS, ZEROS, HIGH_BITS, MINIMA, HEADERS, UNITS = (
    tuple(of(fmt) for fmt in range(len(FORMAT_NAMES)))
    for of in (bits, zero, high_bits, has_minimum, header_bytes, unit_bytes)
)

_four_sums = tile(f32x16, 4)


@kernel
def _sum_of_squares(x, at, n):
    sums = _four_sums()
    for j in range(4):
        sums[j] = splat_f32(ZERO)
    whole = n // 64 * 64
    for i in range(0, whole, 64):
        for j in range(4):
            v = load_f32(x, at + i + 16 * j)
            sums[j] = fma(v, v, sums[j])
    for i in range(whole, n, 16):
        v = load_f32(x, at + i)
        sums[0] = fma(v, v, sums[0])
    return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]))


@kernel
def rms_norm(x, at, n, weights, weight_at, eps, out, out_at):
    """out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i], i < n (Zhang and Sennrich 2019, arXiv:1910.07467).

    x, out: float32; weights: uint8 arena with n float32 at byte weight_at; eps: float32. out may be x.
    """
    inverse = splat_f32(ONE / np.sqrt(_sum_of_squares(x, at, n) / np.float32(n) + eps))
    for i in range(0, n, 16):
        store_f32(out, out_at + i, load_f32(x, at + i) * inverse * load_f32(weights, weight_at + 4 * i))


@kernel
def silu_mul(gate_up, at, panels, out, out_at):
    """out = gate * sigmoid(gate) * up, 16 values of gate and 16 of up in turn (SwiGLU, arXiv:2002.05202).

    gate_up: float32, 32 * panels values from at; out: float32, 16 * panels values from out_at.
    """
    one, nought, most = splat_f32(ONE), splat_f32(ZERO), splat_f32(MOST)
    for p in range(panels):
        gate, up = load_f32(gate_up, at + 32 * p), load_f32(gate_up, at + 32 * p + 16)
        store_f32(out, out_at + 16 * p, gate / (one + exp(vmin(most, nought - gate))) * up)


@kernel
def add_row(x, at, weights, weight_at, n):
    """x[i] += weight[i], i < n: a bias. x: float32; weights: uint8 arena with n float32 at byte weight_at."""
    for i in range(0, n, 16):
        store_f32(x, at + i, load_f32(x, at + i) + load_f32(weights, weight_at + 4 * i))


@kernel
def rope(x, at, half, cos, sin, table_at):
    """(a, b) -> (a cos - b sin, b cos + a sin) for a = x[i], b = x[half + i], i < half (RoPE, arXiv:2104.09864).

    The pairs (i, half + i) are those of GPT-NeoX and Hugging Face, not RoFormer's (2i, 2i + 1). x: float32, changed in
    place; cos, sin: float32 tables, this position's `half` values from table_at.
    """
    vectors = half // 16 * 16
    for i in range(0, vectors, 16):
        a, b = load_f32(x, at + i), load_f32(x, at + half + i)
        c, s = load_f32(cos, table_at + i), load_f32(sin, table_at + i)
        store_f32(x, at + i, a * c - b * s)
        store_f32(x, at + half + i, b * c + a * s)
    for i in range(vectors, half):
        u, v = x[at + i], x[at + half + i]
        x[at + i] = u * cos[table_at + i] - v * sin[table_at + i]
        x[at + half + i] = v * cos[table_at + i] + u * sin[table_at + i]


@inlined
def _stored_scale(weights, units, nested, at, which, lane):
    """A group's scale (which = 0) or minimum (1) in row `lane`. units, at: where units and the group's scales lie."""
    if nested:
        unit = load_scalar_f16(weights, units + 64 * which + 2 * lane)
        return unit * np.float32(np.int8(weights[at + 32 * which + lane]))
    return load_scalar_f16(weights, at + 64 * which + 2 * lane)


@inlined
def _stored_integer(fmt, weights, at, group, lane, k):
    """Integer k of row `lane` of the group whose values begin at byte `at`."""
    high, panel, step = HIGH_BITS[fmt], lane // PANEL, k // 4
    byte = at + 4 * (lane % PANEL) + k % 4
    if WIDTHS[fmt] == 8:
        return np.int32(weights[byte + 128 * step + 64 * panel])
    if WIDTHS[fmt] == 2:
        return np.int32(weights[byte + 64 * (step // 2)]) >> 4 * (step % 2) + 2 * panel & 3
    u = np.int32(weights[byte + 64 * step]) >> 4 * panel & 15
    if high > 0:
        above = np.int32(weights[byte + 16 * group + 64 * high * (step // 4) + 64 * panel * (high - 1)])
        u += (above >> 2 * (step % 4) + panel * (2 - high) & (1 << high) - 1) << 4
    return u


@kernel
def _stored_row(fmt, weights, at, columns, group, lane, out, out_at):
    """Dequantise row `lane` of the integer block at byte `at`."""
    zero, header, nested, size = ZEROS[fmt], HEADERS[fmt], UNITS[fmt] > 0, 4 * group * WIDTHS[fmt]
    units, scales = at, at
    for g in range(columns // group):
        if nested and g % (SUPER // group) == 0:
            units, at = at, at + UNITS[fmt]
        # Of two groups without minima the scales lie together.
        if g * header % CACHE_LINE == 0:
            scales, at = at, at + max(header, CACHE_LINE)
        else:
            scales += header
        scale = _stored_scale(weights, units, nested, scales, 0, lane)
        lowest = _stored_scale(weights, units, nested, scales, 1, lane) if MINIMA[fmt] else ZERO
        for k in range(group):
            u = _stored_integer(fmt, weights, at, group, lane, k)
            out[out_at + g * group + k] = np.float32(u - zero) * scale + lowest
        at += size


@kernel
def embed(weights, matrices, matrix, token, out, out_at):
    """out = row `token` of a packed matrix, as float32.

    weights: uint8 arena; matrices: int64 [n, 6], matrix: row in it; out: float32, COLUMNS values from out_at.
    """
    fmt, columns, group = matrices[matrix, FORMAT], matrices[matrix, COLUMNS], matrices[matrix, GROUP]
    block, lane = token // BLOCK, token % BLOCK
    at = matrices[matrix, OFFSET] + block * matrices[matrix, BLOCK_BYTES]
    if fmt == FLOAT32:
        for k in range(columns):
            out[out_at + k] = load_scalar_f32(weights, at + (k * BLOCK + lane) * 4)
    elif fmt == FLOAT16:
        for k in range(columns):
            out[out_at + k] = load_scalar_f16(weights, at + (k * BLOCK + lane) * 2)
    elif WIDTHS[fmt] == 16:
        for k in range(columns):
            out[out_at + k] = load_scalar_bf16(weights, at + (k // 2 * BLOCK + lane) * 4 + k % 2 * 2)
    else:
        _stored_row(fmt, weights, at, columns, group, lane, out, out_at)
