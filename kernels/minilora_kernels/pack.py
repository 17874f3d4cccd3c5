"""Weight formats: group quantisation, and the block layout that the linear kernels read.

A matrix of N output rows and K input columns is cut into *blocks* of 32 rows (N is padded with zeros); a block
holds two *panels* of 16 rows. Quantised blocks are a sequence of records, one for each group of 16, 32, 64 or 128
columns:

    32 float16 scales | 32 float16 minima (formats with minimum only) | the group's values

    int4:  [group / 4][16 lanes][4 columns] bytes; low nibble: row `lane`, high nibble: row 16 + `lane`
    int5:  the low 4 bits as int4; behind them the fifth ones, [group / 16][16 lanes][4 columns] bytes: bit 2 t + p is
           of panel p and of step t = 0 .. 3, which takes 4 of the 16 columns
    int6:  the low 4 bits as int4; behind them the others, [group / 16][2 panels][16 lanes][4 columns] bytes: bits 2 t
           and 2 t + 1 are of step t
    int8:  [group / 4][2 panels][16 lanes][4 columns] bytes

Stored values u are unsigned. Symmetric formats: weight = scale * (u - zero), zero = 8, 16, 32 or 128. Formats with
minimum: weight = scale * u + minimum. Floating-point blocks are [K][32] numbers. With groups of 32, int4, int4+min,
int5, int5+min and int8 hold GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 unchanged; int6 in groups of 16 holds Q6_K.

All matrices lie in one uint8 array, the *arena*. The *matrices* table has a row of int64 for each:
FORMAT, ROWS (padded), COLUMNS, GROUP, OFFSET and BLOCK_BYTES (both in bytes).
"""

from typing import NamedTuple

import numpy as np

FORMAT, ROWS, COLUMNS, GROUP, OFFSET, BLOCK_BYTES = range(6)

FORMAT_NAMES = (
    *("float32", "float16", "bfloat16"),
    *("int8", "int8+min", "int4", "int4+min", "int5", "int5+min", "int6"),
)
FLOAT32, FLOAT16, BFLOAT16, INT8, INT8_MIN, INT4, INT4_MIN, INT5, INT5_MIN, INT6 = range(len(FORMAT_NAMES))
# Columns of a group, which share a scale.
GROUPS = (16, 32, 64, 128)
_BITS = (32, 16, 16, 8, 8, 4, 4, 5, 5, 6)
_WITH_MINIMUM = (INT8_MIN, INT4_MIN, INT5_MIN)

# The largest finite number of each floating-point format.
LARGEST = {FLOAT32: float(np.finfo(np.float32).max), FLOAT16: 65504.0, BFLOAT16: 3.3895313892515355e38}

BLOCK = 32
PANEL = 16


class Quantized(NamedTuple):
    """A group-quantised matrix before packing, see the module docstring.

    values: uint8 [N, K], below 2^bits; scales, minima: float16 [N, K / group], minima None if symmetric.
    """

    values: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None
    bits: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    @property
    def format(self) -> int:
        """The pack format that holds it."""
        return integer_format(self.bits, self.minima is not None)


def integer_format(width: int, minimum: bool) -> int:
    """The smallest format of integers of at least `width` bits, with a minimum or without."""
    integers = [fmt for fmt in range(len(_BITS)) if not is_float(fmt) and has_minimum(fmt) == minimum]
    return min((fmt for fmt in integers if _BITS[fmt] >= width), key=_BITS.__getitem__)


def is_float(fmt: int) -> bool:
    """Whether a format holds floating-point numbers."""
    return fmt in (FLOAT32, FLOAT16, BFLOAT16)


def bits(fmt: int) -> int:
    """Bits of one value, scales not counted."""
    return _BITS[fmt]


def high_bits(fmt: int) -> int:
    """Bits of a value that lie apart from its low 4: 1 of int5, 2 of int6."""
    return bits(fmt) - 4 if 4 <= bits(fmt) < 8 else 0


def has_minimum(fmt: int) -> bool:
    """Whether a format stores a minimum for each group."""
    return fmt in _WITH_MINIMUM


def zero(fmt: int) -> int:
    """The stored value that stands for weight 0 in a symmetric format; 0 in a format with minimum."""
    return 0 if has_minimum(fmt) or is_float(fmt) else 1 << bits(fmt) - 1


def padded_rows(rows: int) -> int:
    """Rows of whole blocks."""
    return -(-rows // BLOCK) * BLOCK


def header_bytes(fmt: int) -> int:
    """Bytes before the values of a record."""
    return 128 if has_minimum(fmt) else 64


def record_bytes(fmt: int, group: int) -> int:
    """Bytes of a record: one group of one block."""
    return header_bytes(fmt) + BLOCK * group * bits(fmt) // 8


def block_bytes(fmt: int, columns: int, group: int) -> int:
    """Bytes of one block of 32 rows."""
    if is_float(fmt):
        return BLOCK * columns * bits(fmt) // 8
    return columns // group * record_bytes(fmt, group)


def packed_bytes(fmt: int, rows: int, columns: int, group: int) -> int:
    """Bytes of a packed matrix."""
    return padded_rows(rows) // BLOCK * block_bytes(fmt, columns, group)


def table_row(fmt: int, rows: int, columns: int, group: int, offset: int) -> list[int]:
    """A row of the matrices table; group is 0 for floating-point formats."""
    return [fmt, padded_rows(rows), columns, group, offset, block_bytes(fmt, columns, group)]


# ---------------------------------------------------------------- floating point


def widen_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 numbers held as uint16."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def narrow_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 held as uint16, rounded to nearest, ties to even; NaN stays NaN."""
    raw = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((raw + 0x7FFF + (raw >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def check_largest(x: np.ndarray, fmt: int) -> None:
    """Raise OverflowError where one of these numbers is beyond the range of a floating-point format; NaN is ignored."""
    largest = max(float(np.fmax.reduce(x, axis=None)), -float(np.fmin.reduce(x, axis=None)))
    if largest > LARGEST[fmt]:
        raise OverflowError(f"numbers up to {largest:g}, {FORMAT_NAMES[fmt]} ends at {LARGEST[fmt]:g}")


def _encode(x: np.ndarray, fmt: int) -> np.ndarray:
    if fmt == FLOAT16:
        return x.astype(np.float16)
    return narrow_bfloat16(x) if fmt == BFLOAT16 else x.astype(np.float32, copy=False)


def _decode(raw: np.ndarray, fmt: int) -> np.ndarray:
    if fmt == FLOAT16:
        return raw.view(np.float16).astype(np.float32)
    return widen_bfloat16(raw.view(np.uint16)) if fmt == BFLOAT16 else raw.view(np.float32)


def _pad(x: np.ndarray) -> np.ndarray:
    missing = padded_rows(len(x)) - len(x)
    return np.pad(x, ((0, missing), (0, 0))) if missing else x


def pack_float(weight: np.ndarray, fmt: int) -> np.ndarray:
    """The blocks of a floating-point matrix [N, K] as uint8. Raises OverflowError where a number is too large."""
    check_largest(weight, fmt)
    encoded = _pad(_encode(weight, fmt))
    blocks = encoded.reshape(len(encoded) // BLOCK, BLOCK, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(blocks).reshape(-1).view(np.uint8)


# ---------------------------------------------------------------- quantised


def pack_quantized(matrix: Quantized) -> np.ndarray:
    """The blocks of a quantised matrix as uint8."""
    values = _pad(matrix.values)
    blocks, groups, group = len(values) // BLOCK, matrix.scales.shape[1], matrix.group
    fmt = matrix.format
    records = np.empty((blocks, groups, record_bytes(fmt, group)), np.uint8)
    headers = [matrix.scales] if matrix.minima is None else [matrix.scales, matrix.minima]
    for i, header in enumerate(headers):
        by_group = _pad(header.astype(np.float16)).reshape(blocks, BLOCK, groups).transpose(0, 2, 1)
        records[:, :, 64 * i : 64 * (i + 1)] = np.ascontiguousarray(by_group).view(np.uint8)
    lanes = values.reshape(blocks, 2, PANEL, groups, group // 4, 4)
    if matrix.bits == 8:
        parts = [lanes.transpose(0, 3, 4, 1, 2, 5)]
    else:
        nibbles = lanes[:, 0] & 15 | lanes[:, 1] << 4
        parts = [nibbles.transpose(0, 2, 3, 1, 4), *_high_parts(lanes, high_bits(fmt))]
    stored = [part.reshape(blocks, groups, -1) for part in parts]
    records[:, :, header_bytes(fmt) :] = np.concatenate(stored, axis=2)
    return records.reshape(-1)


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


def unpack_quantized(arena: np.ndarray, row: np.ndarray) -> Quantized:
    """The inverse of pack_quantized for one row of the matrices table; padding rows included."""
    fmt, rows, columns, group, offset = (int(x) for x in row[:5])
    blocks, groups, width = rows // BLOCK, columns // group, bits(fmt)
    size = packed_bytes(fmt, rows, columns, group)
    records = arena[offset : offset + size].reshape(blocks, groups, -1)

    def header(i):
        raw = np.ascontiguousarray(records[:, :, 64 * i : 64 * (i + 1)]).view(np.float16)
        return raw.transpose(0, 2, 1).reshape(rows, groups)

    stored = records[:, :, header_bytes(fmt) :]
    if width == 8:
        lanes = stored.reshape(blocks, groups, group // 4, 2, PANEL, 4).transpose(0, 3, 4, 1, 2, 5)
    else:
        low, rest = np.split(stored, [PANEL * group], axis=2)
        nibbles = low.reshape(blocks, groups, group // 4, PANEL, 4).transpose(0, 3, 1, 2, 4)
        lanes = np.stack([nibbles & 15, nibbles >> 4], axis=1)
        if high_bits(fmt):
            lanes |= _high_lanes(rest, high_bits(fmt))
    return Quantized(lanes.reshape(rows, columns), header(0), header(1) if has_minimum(fmt) else None, width)


def dequantize(matrix: Quantized) -> np.ndarray:
    """float32 weights [N, K] of a quantised matrix."""
    rows, columns = matrix.values.shape
    u = matrix.values.reshape(rows, -1, matrix.group).astype(np.float32)
    if matrix.minima is None:
        u -= zero(matrix.format)
    weight = u * matrix.scales.astype(np.float32)[:, :, None]
    if matrix.minima is not None:
        weight += matrix.minima.astype(np.float32)[:, :, None]
    return weight.reshape(rows, columns)


def unpack(arena: np.ndarray, row: np.ndarray) -> np.ndarray:
    """float32 weights [ROWS, COLUMNS] of a packed matrix of any format; padding rows included."""
    fmt, rows, columns, group, offset = (int(x) for x in row[:5])
    if not is_float(fmt):
        return dequantize(unpack_quantized(arena, row))
    raw = arena[offset : offset + packed_bytes(fmt, rows, columns, group)]
    blocks = _decode(raw, fmt).reshape(rows // BLOCK, columns, BLOCK)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1)).reshape(rows, columns)
