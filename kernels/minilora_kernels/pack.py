"""The block layout of matrices that the linear kernels read.

A matrix of N output rows and K input columns is cut into *blocks* of 32 rows (N is padded with zeros); a block
holds two *panels* of 16 rows. Floating-point blocks are [K][32] numbers, those of bfloat16 [K / 2][32][2]. Quantised
blocks are a sequence of records, one for each group of columns (nothing for minima where there are none):

    32 float16 scales | 32 float16 minima | the group's values

Those of nested formats have 256 columns each:

    32 float16 units of the scales | 32 of the minima
    for each group: 32 int8 scales | 32 int8 minima | its values
    or, without minima, for each two groups: 64 int8 scales | the values of the first | those of the second

so that no cache line holds both scales and values. Values are

    2 bits: [group / 8][16 lanes][4 columns] bytes; bits 4 t + 2 p and 4 t + 2 p + 1 are of panel p and of step t = 0
            or 1, which takes 4 of the 8 columns
    4 bits: [group / 4][16 lanes][4 columns] bytes; low nibble: row `lane`, high nibble: row 16 + `lane`
    5 bits: the low 4 as above; behind them the fifth ones, [group / 16][16 lanes][4 columns] bytes: bit 2 t + p is
            of panel p and of step t = 0 .. 3, which takes 4 of the 16 columns
    6 bits: the low 4 as above; behind them the others, [group / 16][2 panels][16 lanes][4 columns] bytes: bits 2 t
            and 2 t + 1 are of step t
    8 bits: [group / 4][2 panels][16 lanes][4 columns] bytes

All matrices lie in one uint8 array, the *arena*. The *matrices* table has a row of int64 for each:
FORMAT, ROWS (padded), COLUMNS, GROUP, OFFSET and BLOCK_BYTES (both in bytes).
"""

import numpy as np

from .floats import BFLOATS, decode, encode
from .formats import SUPER, bits, has_minimum, high_bits, is_float, is_nested
from .memory import CACHE_LINE
from .quantized import Quantized, dequantize

FORMAT, ROWS, COLUMNS, GROUP, OFFSET, BLOCK_BYTES = range(6)

BLOCK = 32
PANEL = 16


def columns_together(fmt: int) -> int:
    """Columns of a floating-point matrix whose numbers lie beside each other: 2 of bfloat16, else 1."""
    return 2 if fmt in BFLOATS else 1


def padded_rows(rows: int) -> int:
    """Rows of whole blocks."""
    return -(-rows // BLOCK) * BLOCK


def header_bytes(fmt: int) -> int:
    """Bytes of the scales and minima of one group of a block: int8 in nested formats, else float16."""
    return BLOCK * (1 if is_nested(fmt) else 2) * (2 if has_minimum(fmt) else 1)


def groups_of_header(fmt: int) -> int:
    """Groups whose scales lie together, before their values."""
    return max(1, CACHE_LINE // header_bytes(fmt))


def unit_bytes(fmt: int) -> int:
    """Bytes of the units of 256 columns of a block, float16; 0 where a format is not nested."""
    return 2 * header_bytes(fmt) if is_nested(fmt) else 0


def block_bytes(fmt: int, columns: int, group: int) -> int:
    """Bytes of one block of 32 rows."""
    values = BLOCK * columns * bits(fmt) // 8
    if is_float(fmt):
        return values
    return values + columns // group * header_bytes(fmt) + columns // SUPER * unit_bytes(fmt)


def packed_bytes(fmt: int, rows: int, columns: int, group: int) -> int:
    """Bytes of a packed matrix."""
    return padded_rows(rows) // BLOCK * block_bytes(fmt, columns, group)


def table_row(fmt: int, rows: int, columns: int, group: int, offset: int) -> list[int]:
    """A row of the matrices table; group is 0 for floating-point formats, PAIR for those that round inputs."""
    return [fmt, padded_rows(rows), columns, group, offset, block_bytes(fmt, columns, group)]


def _pad(x: np.ndarray) -> np.ndarray:
    missing = padded_rows(len(x)) - len(x)
    return np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x


def pack_float(weight: np.ndarray, fmt: int) -> np.ndarray:
    """The blocks of a floating-point matrix [N, K] as uint8. Raises OverflowError where a number is too large."""
    encoded = _pad(encode(weight, fmt))
    blocks = encoded.reshape(len(encoded) // BLOCK, BLOCK, -1, columns_together(fmt)).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).reshape(-1).view(np.uint8)


# ---------------------------------------------------------------- quantised


def pack_quantized(matrix: Quantized) -> np.ndarray:
    """The blocks of a quantised matrix as uint8."""
    fmt, groups = matrix.format, matrix.scales.shape[1]
    scales = matrix.scales[:, :, None] if matrix.minima is None else np.stack([matrix.scales, matrix.minima], axis=2)
    records = _beside(_lines(scales), _values(_pad(matrix.values), groups, fmt), groups // groups_of_header(fmt))
    if matrix.units is not None:
        records = _beside(_lines(matrix.units), records, matrix.units.shape[1])
    return records.reshape(-1)


def _beside(first: np.ndarray, second: np.ndarray, parts: int) -> np.ndarray:
    """The bytes of each block of two arrays, cut into so many parts, in turn: [blocks, parts, ...]."""
    return np.concatenate([x.reshape(len(x), parts, -1) for x in (first, second)], axis=2)


def unpack_quantized(arena: np.ndarray, row: np.ndarray) -> Quantized:
    """The inverse of pack_quantized for one row of the matrices table; padding rows included."""
    fmt, rows, columns, group, offset = (int(x) for x in row[:5])
    blocks, groups, nested = rows // BLOCK, columns // group, is_nested(fmt)
    packed = arena[offset : offset + packed_bytes(fmt, rows, columns, group)].reshape(blocks, -1)
    units, packed = _apart(packed, columns // SUPER, unit_bytes(fmt)) if nested else (None, packed)
    together = groups_of_header(fmt)
    header, stored = _apart(packed, groups // together, together * header_bytes(fmt))
    scales = _numbers(header.reshape(blocks, groups, -1), np.int8 if nested else np.float16)
    return Quantized(
        _unpacked(stored.reshape(blocks, groups, -1), fmt).reshape(rows, columns),
        scales[:, :, 0],
        scales[:, :, 1] if has_minimum(fmt) else None,
        bits(fmt),
        None if units is None else _numbers(units, np.float16),
    )


def _apart(packed: np.ndarray, parts: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of _beside: the first `size` bytes of each of so many parts of a block, and the rest."""
    split = packed.reshape(len(packed), parts, -1)
    return split[:, :, :size], split[:, :, size:]


def unpack(arena: np.ndarray, row: np.ndarray) -> np.ndarray:
    """float32 weights [ROWS, COLUMNS] of a packed matrix of any format; padding rows included."""
    fmt, rows, columns, group, offset = (int(x) for x in row[:5])
    if not is_float(fmt):
        return dequantize(unpack_quantized(arena, row))
    raw = arena[offset : offset + packed_bytes(fmt, rows, columns, group)]
    blocks = decode(raw, fmt).reshape(rows // BLOCK, -1, BLOCK, columns_together(fmt))
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)).reshape(rows, columns)


def _lines(numbers: np.ndarray) -> np.ndarray:
    """Numbers [N, n, kinds] as bytes [blocks, n, ...], those of a block's 32 rows side by side."""
    lines = _pad(numbers).reshape(-1, BLOCK, *numbers.shape[1:]).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(lines).reshape(*lines.shape[:2], -1).view(np.uint8)


def _numbers(lines: np.ndarray, dtype: type) -> np.ndarray:
    """The inverse of _lines."""
    numbers: np.ndarray = (
        np.ascontiguousarray(lines).view(dtype).reshape(*lines.shape[:2], -1, BLOCK).transpose(0, 3, 1, 2)
    )
    return numbers.reshape(-1, *numbers.shape[2:])


def _values(values: np.ndarray, groups: int, fmt: int) -> np.ndarray:
    """The bytes of values [N, K] as they are stored: [blocks, groups, ...]."""
    blocks = len(values) // BLOCK
    lanes = values.reshape(blocks, 2, PANEL, groups, -1, 4)
    if bits(fmt) == 8:
        return lanes.transpose(0, 3, 4, 1, 2, 5).reshape(blocks, groups, -1)
    if bits(fmt) == 2:
        fields = lanes.reshape(blocks, 2, PANEL, groups, -1, 2, 4) << _PAIR_SHIFTS
        pairs = np.bitwise_or.reduce(fields, axis=(1, 5))
        return pairs.transpose(0, 2, 3, 1, 4).reshape(blocks, groups, -1)
    nibbles = lanes[:, 0] & 15 | lanes[:, 1] << 4
    parts = [nibbles.transpose(0, 2, 3, 1, 4), *_high_parts(lanes, high_bits(fmt))]
    return np.concatenate([part.reshape(blocks, groups, -1) for part in parts], axis=2)


def _unpacked(stored: np.ndarray, fmt: int) -> np.ndarray:
    """The inverse of _values, as uint8 [blocks, 2, PANEL, groups, group / 4, 4]."""
    blocks, groups, size = stored.shape
    if bits(fmt) == 8:
        return stored.reshape(blocks, groups, -1, 2, PANEL, 4).transpose(0, 3, 4, 1, 2, 5)
    if bits(fmt) == 2:
        pairs = stored.reshape(blocks, 1, groups, -1, 1, PANEL, 4).transpose(0, 1, 5, 2, 3, 4, 6)
        return (pairs >> _PAIR_SHIFTS & 3).reshape(blocks, 2, PANEL, groups, -1, 4)
    low, rest = np.split(stored, [size * 4 // bits(fmt)], axis=2)
    nibbles = low.reshape(blocks, groups, -1, PANEL, 4).transpose(0, 3, 1, 2, 4)
    lanes = np.stack([nibbles & 15, nibbles >> 4], axis=1)
    return lanes | _high_lanes(rest, high_bits(fmt)) if high_bits(fmt) else lanes


# Where the 2 bits of panel p and of step t lie in their byte: [1, 2 panels, 1, 1, 1, 2 steps, 1].
_PAIR_SHIFTS = np.array([[0, 4], [2, 6]], np.uint8).reshape(1, 2, 1, 1, 1, 2, 1)


def _high_shifts(high: int) -> np.ndarray:
    """Where the high bits of step t and panel p lie in their byte: uint8 [1, 2 panels, 1, 1, 1, 4 steps, 1]."""
    steps, panels = np.arange(4, dtype=np.uint8), np.arange(2, dtype=np.uint8)[:, None]
    return (2 * steps + panels * (2 - high)).reshape(1, 2, 1, 1, 1, 4, 1)


def _high_parts(lanes: np.ndarray, high: int) -> list[np.ndarray]:
    """The bytes of the bits above the low 4, [blocks, groups, ...]; lanes: [blocks, 2, PANEL, groups, group / 4, 4]."""
    if not high:
        return []
    blocks, _, _, groups, steps, _ = lanes.shape
    fields = (lanes >> 4).reshape(blocks, 2, PANEL, groups, steps // 4, 4, 4) << _high_shifts(high)
    by_panel = np.bitwise_or.reduce(fields, axis=5)
    if high == 1:
        return [(by_panel[:, 0] | by_panel[:, 1]).transpose(0, 2, 3, 1, 4)]
    return [by_panel.transpose(0, 3, 4, 1, 2, 5)]


def _high_lanes(stored: np.ndarray, high: int) -> np.ndarray:
    """The inverse of _high_parts: the bits, times 16, of the bytes [blocks, groups, ...]."""
    blocks, groups, _ = stored.shape
    lines = stored.reshape(blocks, groups, -1, 1 if high == 1 else 2, PANEL, 4).transpose(0, 3, 4, 1, 2, 5)
    fields = lines[:, :, :, :, :, None] >> _high_shifts(high) & ((1 << high) - 1)
    return (fields << 4).reshape(blocks, 2, PANEL, groups, -1, 4)
