"""Kernels for one row at a time: embedding, norm, rotation, gating.

Row lengths are multiples of 16. Offsets count elements; in the arena, bytes.
"""

import numpy as np

from .jit import kernel
from .pack import (
    BFLOAT16,
    BLOCK,
    BLOCK_BYTES,
    COLUMNS,
    FLOAT16,
    FLOAT32,
    FORMAT,
    FORMAT_NAMES,
    GROUP,
    OFFSET,
    PANEL,
    bits,
    header_bytes,
    high_bits,
    zero,
)
from .simd import exp, f32x16, fma, splat_f32, tile, vmin
from .simd_lanes import hsum
from .simd_memory import load_f32, load_scalar_bf16, load_scalar_f16, load_scalar_f32, store_f32

ZERO, ONE = np.float32(0), np.float32(1)
# The largest argument that exp takes.
MOST = np.float32(88)
# What embed must know of each format.
WIDTHS, ZEROS, HEADERS, HIGH_BITS = (
    tuple(of(fmt) for fmt in range(len(FORMAT_NAMES))) for of in (bits, zero, header_bytes, high_bits)
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


@kernel
def _stored_row(fmt, weights, at, columns, group, lane, out, out_at):
    """Dequantise row `lane` of the integer block at byte `at`."""
    width, zero, header, panel = WIDTHS[fmt], ZEROS[fmt], HEADERS[fmt], lane // PANEL
    high, byte = HIGH_BITS[fmt], at + header + 4 * (lane % PANEL)
    for g in range(columns // group):
        scale = load_scalar_f16(weights, at + 2 * lane)
        lowest = load_scalar_f16(weights, at + 64 + 2 * lane) if header > 64 else ZERO
        for k in range(group):
            step, column = k // 4, k % 4
            if width == 8:
                u = np.int32(weights[byte + 128 * step + 64 * panel + column])
            else:
                u = np.int32(weights[byte + 64 * step + column]) >> 4 * panel & 15
            if high > 0:
                line = 16 * group + 64 * high * (step // 4) + 64 * panel * (high - 1)
                byte_of_bits = np.int32(weights[byte + line + column])
                u += (byte_of_bits >> 2 * (step % 4) + panel * (2 - high) & (1 << high) - 1) << 4
            out[out_at + g * group + k] = np.float32(u - zero) * scale + lowest
        at += header + 4 * group * width
        byte += header + 4 * group * width


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
    elif fmt == FLOAT16 or fmt == BFLOAT16:
        for k in range(columns):
            place = at + (k * BLOCK + lane) * 2
            out[out_at + k] = load_scalar_f16(weights, place) if fmt == FLOAT16 else load_scalar_bf16(weights, place)
    else:
        _stored_row(fmt, weights, at, columns, group, lane, out, out_at)
