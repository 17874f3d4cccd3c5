"""ggml's tensor types: how their blocks become our weights.

Types with groups of 32 are taken over number by number. K-quants keep their integers, in groups of 16 or 32; their
scales and minima, products of a float16 and an integer, are rounded to float16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minilora_kernels.pack import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT4,
    INT4_MIN,
    INT5,
    INT5_MIN,
    INT6,
    INT8,
    Quantized,
    bits,
    check_largest,
    dequantize,
    widen_bfloat16,
    zero,
)

SUPER = 256


@dataclass(frozen=True)
class BlockType:
    """A ggml type: `values` numbers in `size` bytes. decode: uint8 [rows, blocks, size] -> what it stands for.

    format, group: what it becomes; decode_exactly: its float32 values, where decode rounds scales.
    """

    name: str
    values: int
    size: int
    format: int
    decode: Callable[[np.ndarray], Quantized | np.ndarray]
    group: int = 0
    decode_exactly: Callable[[np.ndarray], np.ndarray] | None = None

    def blocks(self, raw: np.ndarray) -> np.ndarray:
        """uint8 [rows, bytes] as [rows, blocks, size]."""
        return raw.reshape(len(raw), -1, self.size)

    def weights(self, raw: np.ndarray) -> Quantized | np.ndarray:
        """Rows of raw bytes as Quantized, or float32 [rows, columns] if they are floating-point numbers.

        Raises OverflowError where the scale of a K-quant is too large for float16.
        """
        return self.decode(self.blocks(raw))

    def floats(self, raw: np.ndarray) -> np.ndarray:
        """Rows of raw bytes as float32, exactly as the type defines them."""
        if self.decode_exactly:
            return self.decode_exactly(self.blocks(raw))
        decoded = self.weights(raw)
        return dequantize(decoded) if isinstance(decoded, Quantized) else decoded


def _half(x: np.ndarray) -> np.ndarray:
    """The float16 numbers in the last axis's byte pairs."""
    return np.ascontiguousarray(x).view(np.float16)


def _float_decoder(dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: np.ascontiguousarray(blocks.reshape(len(blocks), -1)).view(dtype).astype(np.float32)


def _decode_bf16(blocks: np.ndarray) -> np.ndarray:
    return widen_bfloat16(np.ascontiguousarray(blocks.reshape(len(blocks), -1)).view(np.uint16))


# ---------------------------------------------------------------- groups of 32


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """16 bytes -> 32 values: low nibbles, then high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """4 bytes -> 32 bits, each 0 or 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _quantized(values: np.ndarray, scales: np.ndarray, minima: np.ndarray | None, bits: int) -> Quantized:
    rows = len(values)
    flat = np.ascontiguousarray(values.reshape(rows, -1))
    return Quantized(flat, scales.reshape(rows, -1), None if minima is None else minima.reshape(rows, -1), bits)


def _decode_q4_0(blocks: np.ndarray) -> Quantized:
    return _quantized(_nibbles(blocks[..., 2:]), _half(blocks[..., :2]), None, 4)


def _decode_q4_1(blocks: np.ndarray) -> Quantized:
    return _quantized(_nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4]), 4)


def _decode_q5_0(blocks: np.ndarray) -> Quantized:
    values = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return _quantized(values, _half(blocks[..., :2]), None, 5)


def _decode_q5_1(blocks: np.ndarray) -> Quantized:
    values = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return _quantized(values, _half(blocks[..., :2]), _half(blocks[..., 2:4]), 5)


def _decode_q8_0(blocks: np.ndarray) -> Quantized:
    return _quantized(blocks[..., 2:] ^ np.uint8(128), _half(blocks[..., :2]), None, 8)


# ---------------------------------------------------------------- K-quants: 256 values


def _bit_fields(packed: np.ndarray, width: int, run: int) -> np.ndarray:
    """Fields of `width` bits from the low end on; the first fields of `run` bytes, then their second ones, ..."""
    runs = packed.reshape(*packed.shape[:-1], -1, 1, run)
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields = runs >> shifts & np.uint8((1 << width) - 1)
    return fields.reshape(*packed.shape[:-1], -1)


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, as Q4_K and Q5_K store them."""
    low, middle, high = (packed[..., i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=-1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=-1)
    return scales, minima


def _k4_parts(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values 0..15, float32 scales, float32 minima) of Q4_K: 144 bytes."""
    scales, minima = _k_scales(blocks[..., :16])
    return _bit_fields(blocks[..., 16:], 4, 32), scales, minima


def _k5_parts(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values 0..31, float32 scales, float32 minima) of Q5_K: 176 bytes."""
    scales, minima = _k_scales(blocks[..., :16])
    return _bit_fields(blocks[..., 48:], 4, 32) | _bit_fields(blocks[..., 16:48], 1, 32) << 4, scales, minima


def _k_scales(head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, minima = _six_bit_pairs(head[..., 4:])
    d, dmin = _half(head[..., :2]).astype(np.float32), _half(head[..., 2:4]).astype(np.float32)
    return d * scales, -(dmin * minima)


def _repacked(parts: Callable, width: int) -> Callable[[np.ndarray], Quantized]:
    def decode(blocks: np.ndarray) -> Quantized:
        values, scales, minima = parts(blocks)
        return _quantized(values, _narrowed(scales), None if minima is None else _narrowed(minima), width)

    return decode


def _narrowed(numbers: np.ndarray) -> np.ndarray:
    check_largest(numbers, FLOAT16)
    return numbers.astype(np.float16)


def _exactly(parts: Callable, nought: int, group: int) -> Callable[[np.ndarray], np.ndarray]:
    def decode(blocks: np.ndarray) -> np.ndarray:
        values, scales, minima = parts(blocks)
        grouped = values.reshape(*values.shape[:-1], -1, group).astype(np.float32) - nought
        weights = grouped * scales[..., None]
        if minima is not None:
            weights += minima[..., None]
        return weights.reshape(len(blocks), -1)

    return decode


def _k2_parts(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q2_K: 16 bytes of scale and minimum nibbles, 64 of values, d and dmin."""
    d, dmin = _half(blocks[..., 80:82]).astype(np.float32), _half(blocks[..., 82:84]).astype(np.float32)
    return _bit_fields(blocks[..., 16:80], 2, 32), d * (blocks[..., :16] & 15), -(dmin * (blocks[..., :16] >> 4))


def _k3_parts(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    """Q3_K: 32 bytes of third bits, 64 of low bits, 12 of 6-bit scales, d; values 4 .. 11 for -4 .. 3."""
    low, packed = _bit_fields(blocks[..., 32:96], 2, 32), blocks[..., 96:108]
    third = _bit_fields(blocks[..., :32], 1, 32)
    scales = _bit_fields(packed[..., :8], 4, 8) | _bit_fields(packed[..., 8:], 2, 4) << 4
    d = _half(blocks[..., 108:110]).astype(np.float32)
    return (low | third << 2) + np.uint8(4), d * (scales.astype(np.int8) - 32), None


def _k6_parts(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    """Q6_K: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, d; values 0 .. 63 for -32 .. 31."""
    values = _bit_fields(blocks[..., :128], 4, 64) | _bit_fields(blocks[..., 128:192], 2, 32) << 4
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return values, _half(blocks[..., 208:210]).astype(np.float32) * scales, None


def _k_quant(name: str, size: int, fmt: int, group: int, parts: Callable) -> BlockType:
    return BlockType(name, SUPER, size, fmt, _repacked(parts, bits(fmt)), group, _exactly(parts, zero(fmt), group))


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, FLOAT32, _float_decoder(np.float32)),
    1: BlockType("F16", 1, 2, FLOAT16, _float_decoder(np.float16)),
    2: BlockType("Q4_0", 32, 18, INT4, _decode_q4_0, 32),
    3: BlockType("Q4_1", 32, 20, INT4_MIN, _decode_q4_1, 32),
    6: BlockType("Q5_0", 32, 22, INT5, _decode_q5_0, 32),
    7: BlockType("Q5_1", 32, 24, INT5_MIN, _decode_q5_1, 32),
    8: BlockType("Q8_0", 32, 34, INT8, _decode_q8_0, 32),
    10: _k_quant("Q2_K", 84, INT4_MIN, 16, _k2_parts),
    11: _k_quant("Q3_K", 110, INT4, 16, _k3_parts),
    12: _k_quant("Q4_K", 144, INT4_MIN, 32, _k4_parts),
    13: _k_quant("Q5_K", 176, INT5_MIN, 32, _k5_parts),
    14: _k_quant("Q6_K", 210, INT6, 16, _k6_parts),
    30: BlockType("BF16", 1, 2, BFLOAT16, _decode_bf16),
}
