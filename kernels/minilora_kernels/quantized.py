"""Group-quantised matrices as NumPy arrays, before they are packed; see formats."""

from typing import NamedTuple

import numpy as np

from .floats import narrow_float16
from .formats import SUPER, bits, has_minimum, integer_format, is_nested, zero


class Quantized(NamedTuple):
    """Integers, their scales and minima; minima are None in symmetric formats, units in those that are not nested.

    values: uint8 [N, K], below 2^bits; scales, minima: float16 [N, K / group], or int8, in these units; units: float16
    [N, K / 256, 1], of scales, or [N, K / 256, 2], of scales and of minima.
    """

    values: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None
    bits: int
    units: np.ndarray | None = None

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    @property
    def format(self) -> int:
        """The format that holds it."""
        return integer_format(self.bits, self.minima is not None, self.units is not None)

    @property
    def zero(self) -> int:
        """The integer that stands for weight 0 in a symmetric format; 0 with minima."""
        return 0 if self.minima is not None else 1 << self.bits - 1

    def float_scales(self) -> np.ndarray:
        """The scales as float32 [N, K / group], exactly."""
        return self._in_units(self.scales, 0)

    def float_minima(self) -> np.ndarray | None:
        """Likewise the minima."""
        return None if self.minima is None else self._in_units(self.minima, 1)

    def _in_units(self, numbers: np.ndarray, which: int) -> np.ndarray:
        if self.units is None:
            return numbers.astype(np.float32)
        return numbers * np.repeat(self.units[:, :, which].astype(np.float32), SUPER // self.group, axis=1)


def dequantize(matrix: Quantized) -> np.ndarray:
    """float32 weights [N, K] of a quantised matrix."""
    rows, columns = matrix.values.shape
    u = matrix.values.reshape(rows, -1, matrix.group).astype(np.float32)
    if matrix.minima is None:
        u -= matrix.zero
    u *= matrix.float_scales()[:, :, None]
    minima = matrix.float_minima()
    if minima is not None:
        u += minima[:, :, None]
    return u.reshape(rows, columns)


def convert(matrix: Quantized, fmt: int, group: int) -> Quantized:
    """The same weights in a format that common_format allows, and in groups that divide theirs.

    Nested scales and minima are rounded to float16 if the format is not nested; all else is exact. Raises OverflowError
    where float16 can't hold a scale or a minimum.
    """
    if not is_nested(fmt) and matrix.units is not None:
        matrix = _not_nested(matrix)
    if has_minimum(fmt) and matrix.minima is None:
        matrix = _with_minimum(matrix)
    values, times = matrix.values, matrix.group // group
    if matrix.zero != zero(fmt):
        values = values + np.uint8(zero(fmt) - matrix.zero)
    scales, minima = matrix.scales, matrix.minima
    if times > 1:
        scales = np.repeat(scales, times, axis=1)
        minima = None if minima is None else np.repeat(minima, times, axis=1)
    return Quantized(values, scales, minima, bits(fmt), matrix.units)


def _not_nested(matrix: Quantized) -> Quantized:
    minima = matrix.float_minima()
    scales = narrow_float16(matrix.float_scales())
    return Quantized(matrix.values, scales, None if minima is None else narrow_float16(minima), matrix.bits)


def _with_minimum(matrix: Quantized) -> Quantized:
    """A symmetric matrix with the minimum -zero * scale."""
    nought = -np.float32(matrix.zero)
    if matrix.units is None:
        minima = narrow_float16(nought * matrix.scales.astype(np.float32))
        return Quantized(matrix.values, matrix.scales, minima, matrix.bits)
    units = np.concatenate([matrix.units, narrow_float16(nought * matrix.units.astype(np.float32))], axis=2)
    return Quantized(matrix.values, matrix.scales, matrix.scales, matrix.bits, units)
