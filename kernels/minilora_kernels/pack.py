"""Weight formats: group quantisation, and the block layout that the linear kernels read.

A matrix of N output rows and K input columns is cut into *blocks* of 32 rows (N is padded with zeros); a block
holds two *panels* of 16 rows. Quantised blocks are a sequence of records, one for each group of 32, 64 or 128
columns:

    32 float16 scales | 32 float16 minima (formats with minimum only) | the group's values

    int4:  [group / 4][16 lanes][4 columns] bytes; low nibble: row `lane`, high nibble: row 16 + `lane`
    int8:  [group / 4][2 panels][16 lanes][4 columns] bytes

Stored values u are unsigned. Symmetric formats: weight = scale * (u - zero), zero = 8 or 128. Formats with
minimum: weight = scale * u + minimum. Floating-point blocks are [K][32] numbers. With groups of 32, int4, int4+min,
int8 and int8+min hold GGUF's Q4_0, Q4_1, Q8_0 and Q5_1 unchanged.

All matrices lie in one uint8 array, the *arena*. The *matrices* table has a row of int64 for each:
FORMAT, ROWS (padded), COLUMNS, GROUP, OFFSET and BLOCK_BYTES (both in bytes).
"""

from typing import NamedTuple

import numpy as np

FORMAT, ROWS, COLUMNS, GROUP, OFFSET, BLOCK_BYTES = range(6)

FLOAT32, FLOAT16, BFLOAT16, INT8, INT8_MIN, INT4, INT4_MIN = range(7)
FORMAT_NAMES = ("float32", "float16", "bfloat16", "int8", "int8+min", "int4", "int4+min")
# Columns of a group, which share a scale.
GROUPS = (32, 64, 128)

# The largest finite number of each floating-point format.
LARGEST = {FLOAT32: float(np.finfo(np.float32).max), FLOAT16: 65504.0, BFLOAT16: 3.3895313892515355e38}

BLOCK = 32
PANEL = 16


class Quantized(NamedTuple):
    """A group-quantised matrix before packing, see the module docstring.

    values: uint8 [N, K], 0..15 or 0..255; scales, minima: float16 [N, K / group], minima None if symmetric.
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
        symmetric, with_minimum = (INT4, INT4_MIN) if self.bits == 4 else (INT8, INT8_MIN)
        return symmetric if self.minima is None else with_minimum


def is_float(fmt: int) -> bool:
    """Whether a format holds floating-point numbers."""
    return fmt in (FLOAT32, FLOAT16, BFLOAT16)


def bits(fmt: int) -> int:
    """Bits of one value, scales not counted."""
    return {FLOAT32: 32, FLOAT16: 16, BFLOAT16: 16, INT8: 8, INT8_MIN: 8, INT4: 4, INT4_MIN: 4}[fmt]


def has_minimum(fmt: int) -> bool:
    """Whether a format stores a minimum for each group."""
    return fmt in (INT8_MIN, INT4_MIN)


def zero(fmt: int) -> int:
    """The stored value that stands for weight 0 in a symmetric format; 0 in a format with minimum."""
    return {INT4: 8, INT8: 128}.get(fmt, 0)


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
    if matrix.bits == 4:
        nibbles = lanes[:, 0] | lanes[:, 1] << 4
        ordered = nibbles.transpose(0, 2, 3, 1, 4)
    else:
        ordered = lanes.transpose(0, 3, 4, 1, 2, 5)
    records[:, :, header_bytes(fmt) :] = ordered.reshape(blocks, groups, -1)
    return records.reshape(-1)


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
    if width == 4:
        nibbles = stored.reshape(blocks, groups, group // 4, PANEL, 4).transpose(0, 3, 1, 2, 4)
        lanes = np.stack([nibbles & 15, nibbles >> 4], axis=1)
    else:
        lanes = stored.reshape(blocks, groups, group // 4, 2, PANEL, 4).transpose(0, 3, 4, 1, 2, 5)
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
