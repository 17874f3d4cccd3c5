"""Twins of matrix products."""

import numpy as np

from ..floats import widen_bfloat16
from ..formats import is_float, rounds_inputs
from ..inputs import GROUP_MIN
from ..pack import BLOCK, COLUMNS, FORMAT, GROUP, unpack, unpack_quantized
from .flat import grid


def linear(weights, matrices, matrix, x, x_row, rows, block0, block1, out, out_at, out_stride, add, room, room_at):
    """out[r, c] (+)= sum over k of x[x_row + r, k] * weight[32 * block0 + c, k]."""
    row = matrices[matrix]
    columns, group = int(row[COLUMNS]), int(row[GROUP])
    chosen = slice(block0 * BLOCK, block1 * BLOCK)
    if is_float(row[FORMAT]):
        values = grid(_floats(x, int(row[FORMAT])), x_row * x.stride, x.stride, rows, columns)
        y = values.astype(np.float64) @ unpack(weights, row)[chosen].T.astype(np.float64)
    else:
        y = _grouped_product(unpack_quantized(weights, row), x, x_row, rows, columns, group, chosen)
    target = grid(out, out_at, out_stride, rows, y.shape[1])
    target[:] = target + y if add else y


def _floats(x, fmt):
    """The inputs that a floating-point format multiplies."""
    return widen_bfloat16(x.rounded.view(np.uint16)) if rounds_inputs(fmt) else x.values


def _grouped_product(matrix, x, x_row, rows, columns, group, chosen):
    """Sum over groups of scale * x_scale * (integer dot) + minimum * x_scale * (sum of q)."""
    q = grid(x.q, x_row * x.stride, x.stride, rows, columns).astype(np.int64).reshape(rows, -1, group)
    stride = x.stride // GROUP_MIN
    x_scale = grid(x.scales, x_row * stride, stride, rows, columns // group).astype(np.float64)
    u = matrix.values[chosen].astype(np.int64).reshape(-1, columns // group, group) - matrix.zero
    dots = np.einsum("mgk,ngk->mng", q, u)
    y = np.einsum("mng,ng,mg->mn", dots, matrix.float_scales()[chosen].astype(np.float64), x_scale)
    minima = matrix.float_minima()
    if minima is not None:
        y += np.einsum("mg,ng->mn", x_scale * q.sum(axis=2), minima[chosen].astype(np.float64))
    return y


def dot4(acc, u, s):
    """acc[i] + sum over j < 4 of u[4 i + j] * s[4 i + j]: u uint8, s int8, acc int32."""
    return acc + (u.astype(np.int32) * s.astype(np.int32)).reshape(-1, 4).sum(axis=1, dtype=np.int32)
