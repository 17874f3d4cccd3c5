"""Twins of adapters' kernels; numbers as the integers of 14 bits that `wide` stores."""

import numpy as np

from ..dot import PAIRS
from ..formats import FLOAT16, FLOAT32, INT8
from ..inputs import FINE_STEP, GROUP_MIN
from ..pack import PANEL
from .flat import grid


def _panels(arena, at, panels, inner, fmt, together=1, offset=0):
    """Panels [panels, inner, 16] at byte `at`, as float32; of int8, + offset, `together` of a row lie side by side."""
    if fmt == INT8:
        raw = arena[at : at + panels * (64 + inner * PANEL)].reshape(panels, -1)
        scales = np.ascontiguousarray(raw[:, :64]).view(np.float32)
        numbers = raw[:, 64:].view(np.uint8 if offset else np.int8).astype(np.float32) - offset
        numbers = numbers.reshape(panels, inner // together, PANEL, together).transpose(0, 1, 3, 2)
        return scales[:, None] * numbers.reshape(panels, inner, PANEL)
    dtype = np.dtype({FLOAT32: np.float32, FLOAT16: np.float16}[fmt])
    count = panels * inner * PANEL
    return arena[at : at + count * dtype.itemsize].view(dtype).astype(np.float32).reshape(panels, inner, PANEL)


def to_wide(numbers):
    """Numbers [rows, 16 n] as wide.store_sixteen leaves them, float32 of the same shape."""
    panels = np.asarray(numbers, np.float32).reshape(-1, PANEL)
    scale = np.abs(panels).max(axis=1) / np.float32(127 * 128)
    v = np.rint(
        np.divide(panels, scale[:, None], out=np.zeros_like(panels), where=scale[:, None] >= np.finfo(np.float32).tiny)
    ).astype(np.int32)
    out = np.zeros_like(panels)
    out[:, :8] = wide_words(v)
    out[:, 8] = scale
    out[:, 9:13] = (-v).reshape(-1, 4, 4).sum(axis=2, dtype=np.int32).view(np.float32)
    return out.reshape(numbers.shape)


def from_wide(words):
    """The numbers for which store_sixteen's words stand, of the same shape."""
    panels = words.reshape(-1, PANEL)
    return (wide_integers(panels[:, :8]) * panels[:, 8:9]).astype(np.float32).reshape(words.shape)


def wide_words(v):
    """Integers [rows, 16] as words, float32 [rows, 8]."""
    if PAIRS:
        parts = [v[:, i::2].astype(np.int16) for i in (0, 1)]
    else:
        parts = [(v >> 7).astype(np.int8), (v & 127).astype(np.int8)]
    return np.hstack([np.ascontiguousarray(part).view(np.float32) for part in parts])


def wide_integers(words):
    """The integers of words, int64 [rows, 16]."""
    dtype = np.int16 if PAIRS else np.int8
    first, second = (np.ascontiguousarray(words[:, i : i + 4]).view(dtype).astype(np.int64) for i in (0, 4))
    return np.stack([first, second], axis=2).reshape(-1, 16) if PAIRS else 128 * first + second


def _inputs(x, x_row, rows, columns, group, fmt):
    """The numbers of Rows that A is multiplied with."""
    if fmt != INT8:
        return grid(x.values, x_row * x.stride, x.stride, rows, columns)
    groups = x.stride // GROUP_MIN
    scales = grid(x.scales, x_row * groups, groups, rows, -(-columns // group)).repeat(group, axis=1)[:, :columns]
    return scales * FINE_STEP * grid(x.fine, x_row * x.stride, x.stride, rows, columns)


def make_lora(fmt):
    """(shrink, gather, expand) for adapters stored as FLOAT32, FLOAT16 or INT8."""
    leave = to_wide if fmt == INT8 else lambda numbers: numbers

    def shrink(arena, at, following, columns, group, panel, x, x_row, rows, scale, s):
        a = _panels(arena, at, panel + 1, columns, fmt, 2)[panel]
        product = scale * (_inputs(x, x_row, rows, columns, group, fmt) @ a)
        grid(s.array, s.at + panel * PANEL, s.stride, rows, PANEL)[:] = leave(product)

    def gather(arena, at, columns, panels, token, scale, s, s_at):
        numbers = scale * _panels(arena, at, panels, columns, fmt)[:, token]
        s[s_at : s_at + panels * PANEL] = leave(numbers).reshape(-1)

    def expand(arena, at, rank, panel0, panel1, prefetch_at, s, column, rows, out):
        b, whole = _panels(arena, at, panel1, rank, fmt, 4, 128), -(-(column + rank) // PANEL) * PANEL
        shrunk = grid(s.array, s.at, s.stride, rows, whole)
        shrunk = (from_wide(shrunk) if fmt == INT8 else shrunk)[:, column : column + rank]
        for p in range(panel0, panel1):
            grid(out.array, out.at + (p - panel0) * out.step, out.stride, rows, PANEL)[:] += shrunk @ b[p]

    return shrink, gather, expand
