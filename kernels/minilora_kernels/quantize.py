"""Float weights to groups of integers, when a model is loaded."""

from functools import cache

import numpy as np

from .floats import check_largest
from .formats import FLOAT16
from .jit import kernel, program
from .quantized import Quantized
from .simd import f32x16, fma, round_i32, splat_f32, tile, to_f32, vmax, vmin
from .simd_lanes import hmax, hsum
from .simd_memory import load_f32

# How many ranges are tried for 4 bits, and by how much of the widest each is narrower than the one before.
RANGES = 14
SHRINK = np.float32(0.035)
LEVELS = np.float32(15)

ZERO, ONE = np.float32(0), np.float32(1)

_sums = tile(f32x16, 3)


def quantize(weight: np.ndarray, bits: int, group: int) -> Quantized:
    """Group-quantised form of float32 weights [N, K]; K is a multiple of group, one of GROUPS.

    8 bits: scale = max |w| / 127, without a minimum; 4 bits: with one, see fit_ranges. Scales and minima are rounded to
    float16 before the weights are. Raises OverflowError where a weight is too large for it, ValueError for other bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights are quantised to 4 or 8 bits, not to {bits}")
    grouped = np.ascontiguousarray(weight, np.float32).reshape(len(weight), -1, group)
    check_largest(grouped, FLOAT16)
    if bits == 8:
        scales = _rounded(np.abs(grouped).max(axis=2) / 127)
        levels = _levels(grouped, scales, None, -127, 127)
        return Quantized((levels + 128).astype(np.uint8), scales, None, 8)
    ranges = np.empty((2, *grouped.shape[:2]), np.float32)
    _compiled_fit()(grouped.reshape(-1), group, ranges[0].reshape(-1), ranges[1].reshape(-1))
    check_largest(ranges, FLOAT16)
    scales, minima = _rounded(ranges[0]), ranges[1].astype(np.float16)
    levels = _levels(grouped, scales, minima, 0, 15)
    return Quantized(levels.astype(np.uint8), scales, minima, 4)


def _rounded(scales: np.ndarray) -> np.ndarray:
    """As float16. Subnormal scales are rounded up.

    Rounded down, the top level would fall short of the largest weight, or the scale become 0.
    """
    rounded = scales.astype(np.float16)
    short = (rounded < scales) & (scales < np.finfo(np.float16).smallest_normal)
    rounded[short] = np.nextafter(rounded[short], np.float16(np.inf))
    return rounded


def _levels(grouped: np.ndarray, scales: np.ndarray, minima: np.ndarray | None, least: int, most: int) -> np.ndarray:
    """round((w - minimum) / scale) between least and most, as float32 [N, K]; 0 where the scale is 0."""
    step = scales.astype(np.float32)[:, :, None]
    levels = grouped.copy() if minima is None else grouped - minima.astype(np.float32)[:, :, None]
    levels *= np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    np.rint(levels, out=levels)
    return np.clip(levels, least, most, out=levels).reshape(len(grouped), -1)


@kernel
def fit_ranges(weight, group, scales, minima):
    """The scale and minimum of each group: weight ~ minimum + scale * (0 .. 15), least squared error.

    Each of several ranges, narrower one by one, gives levels, and a straight line through (level, weight) by least
    squares a scale and a minimum; the best of them stays. weight: float32, a multiple of `group` numbers; scales,
    minima: float32, one of each for every group.
    """
    for g in range(len(weight) // group):
        low, high, total, square = (
            splat_f32(np.float32(np.inf)),
            splat_f32(np.float32(-np.inf)),
            splat_f32(ZERO),
            splat_f32(ZERO),
        )
        for i in range(g * group, (g + 1) * group, 16):
            w = load_f32(weight, i)
            low, high, total, square = vmin(w, low), vmax(w, high), total + w, fma(w, w, square)
        lowest, highest = -hmax(splat_f32(ZERO) - low), hmax(high)
        best, scales[g], minima[g] = np.float32(np.inf), ZERO, lowest
        for r in range(RANGES):
            if highest > lowest:
                cut = (highest - lowest) * SHRINK * np.float32(r)
                error, scale, minimum = _fit(
                    weight,
                    g * group,
                    group,
                    lowest + cut / np.float32(2),
                    (highest - lowest - cut) / LEVELS,
                    hsum(total),
                    hsum(square),
                )
                if error < best:
                    best, scales[g], minima[g] = error, scale, minimum


@kernel
def _fit(weight, at, group, low, step, total, square):
    """(squared error, scale, minimum) of the line through the levels that `low` and `step` give."""
    sums, base, inverse, nought, top = (
        _sums(),
        splat_f32(low),
        splat_f32(ONE / step),
        splat_f32(ZERO),
        splat_f32(LEVELS),
    )
    for j in range(3):
        sums[j] = nought
    for i in range(at, at + group, 16):
        w = load_f32(weight, i)
        level = to_f32(round_i32(vmin(vmax((w - base) * inverse, nought), top)))
        sums[0], sums[1], sums[2] = sums[0] + level, fma(level, level, sums[1]), fma(level, w, sums[2])
    levels, squares, products, n = hsum(sums[0]), hsum(sums[1]), hsum(sums[2]), np.float32(group)
    spread = n * squares - levels * levels
    scale = (n * products - levels * total) / spread if spread > ZERO else ZERO
    minimum = (total - scale * levels) / n
    return square - scale * products - minimum * total, scale, minimum


@cache
def _compiled_fit():
    return program(fit_ranges.py_func)
