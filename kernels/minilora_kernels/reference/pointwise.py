"""Twins of what is computed number by number and row by row."""

import numpy as np

from ..floats import narrow_bfloat16
from ..inputs import FINE_STEP, GROUP_MIN
from ..pack import COLUMNS, PANEL, unpack
from .flat import span


def rms_norm(x, at, n, weights, weight_at, eps, out, out_at):
    """out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]."""
    v = span(x, at, n).astype(np.float64)
    weight = span(weights, weight_at, 4 * n).view(np.float32)
    out[out_at : out_at + n] = v / np.sqrt(np.mean(v * v) + eps) * weight


def quantize_row(x, at, n, group, rows, row, column):
    """q = round(x / scale), scale = max |x| / 127 in each group, NaN where a number is not finite."""
    _quantize(x, at, n, group, rows, row, column)


def quantize_row_finely(x, at, n, group, rows, row, column):
    """quantize_row, and fine = round(x / (scale * FINE_STEP))."""
    steps, to = _quantize(x, at, n, group, rows, row, column), row * rows.stride + column
    rows.fine[to : to + n] = np.rint(steps / FINE_STEP).reshape(-1)[:n]


def round_row(x, at, n, rows, row, column):
    """rounded = x as bfloat16, to nearest, ties to even; NaN stays NaN."""
    to = row * rows.stride + column
    rows.rounded[to : to + n] = narrow_bfloat16(span(x, at, n)).view(np.int16)


def _quantize(x, at, n, group, rows, row, column):
    """Fills q, scales, sums and offsets; returns x / scale, before it is rounded."""
    v = np.pad(span(x, at, n), (0, -n % group)).reshape(-1, group)
    finite = np.isfinite(v).all(axis=1, keepdims=True)
    v = np.where(finite, v, np.float32(0))
    scale = np.where(finite, np.abs(v).max(axis=1, keepdims=True) / np.float32(127), np.float32(np.nan))
    steps = v * np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale >= np.finfo(np.float32).tiny)
    q = np.rint(steps).astype(np.int32)
    to, scale_to = row * rows.stride + column, row * (rows.stride // GROUP_MIN) + column // group
    groups = slice(scale_to, scale_to + len(v))
    rows.q[to : to + n] = q.reshape(-1)[:n]
    rows.scales[groups] = scale[:, 0]
    rows.sums[groups] = -q.sum(axis=1)
    rows.offsets[groups] = rows.scales[groups] * q.sum(axis=1).astype(np.float32)
    return steps


def silu_mul(gate_up, at, panels, out, out_at):
    """out = gate * sigmoid(gate) * up, 16 values of gate and 16 of up in turn."""
    gate, up = np.moveaxis(span(gate_up, at, 32 * panels).reshape(panels, 2, PANEL), 1, 0).astype(np.float64)
    out[out_at : out_at + 16 * panels] = (gate / (1 + np.exp(-gate)) * up).reshape(-1)


def add_row(x, at, weights, weight_at, n):
    """x[i] += weight[i]."""
    x[at : at + n] += span(weights, weight_at, 4 * n).view(np.float32)


def rope(x, at, half, cos, sin, table_at):
    """(a, b) -> (a cos - b sin, b cos + a sin) for a = x[i], b = x[half + i]."""
    a, b = x[at : at + half].copy(), x[at + half : at + 2 * half].copy()
    c, s = span(cos, table_at, half), span(sin, table_at, half)
    x[at : at + half], x[at + half : at + 2 * half] = a * c - b * s, b * c + a * s


def embed(weights, matrices, matrix, token, out, out_at):
    """out = row `token` of a packed matrix."""
    row = matrices[matrix]
    out[out_at : out_at + row[COLUMNS]] = unpack(weights, row)[token]
