"""Twins of what turns one format of numbers into another."""

import numpy as np

from ..pack import PANEL
from ..quantize import RANGES, SHRINK
from .flat import span


def narrow(x, n, out, at):
    """out[at + i] = float16(x[i]); returns max |x|, for numbers that float16 can hold."""
    out[at : at + n] = x[:n].astype(np.float16).view(np.uint16)
    return np.abs(x[:n]).max()


def widen(x, n, out):
    """out[i] = float32(x[i])."""
    out[:n] = x[:n].view(np.float16)


def quantize_panels(x, panels, inner, together, offset, out, at):
    """scale[i] = max(|x[k, i]| for all k, 1e-30) / 127, q = round(x / scale) in each panel x of [inner][16]."""
    v = span(x, 0, panels * inner * PANEL).reshape(panels, inner, PANEL)
    scales = np.maximum(np.abs(v).max(axis=1), np.float32(1e-30)) / np.float32(127)
    q = (np.rint(v / scales[:, None]) + offset).astype(np.int16).astype(np.uint8)
    raw = out[at : at + panels * (64 + inner * PANEL)].reshape(panels, -1)
    q = q.reshape(panels, inner // together, together, PANEL).transpose(0, 1, 3, 2)
    raw[:, :64], raw[:, 64:] = scales.view(np.uint8), q.reshape(panels, -1)


def fit_ranges(weight, group, scales, minima):
    """The scale and minimum of each group with the least squared error among several narrowing ranges."""
    for g, w in enumerate(weight.reshape(-1, group).astype(np.float64)):
        low, high, best = w.min(), w.max(), np.inf
        scales[g], minima[g] = 0, low
        for r in range(RANGES if high > low else 0):
            cut = (high - low) * SHRINK * r
            level = np.rint(np.clip((w - low - cut / 2) / ((high - low - cut) / 15), 0, 15))
            scale, minimum = np.polyfit(level, w, 1) if np.ptp(level) else (0.0, w.mean())
            error = ((w - scale * level - minimum) ** 2).sum()
            if error < best:
                best, scales[g], minima[g] = error, scale, minimum
