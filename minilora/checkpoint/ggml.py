"""ggml's tensor types: how their blocks become our weights, number by number.

K-quants become nested formats, the others those with float16 scales.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minilora_kernels.floats import widen_bfloat16
from minilora_kernels.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT2K_MIN,
    INT4,
    INT4_MIN,
    INT4K,
    INT4K_MIN,
    INT5,
    INT5_MIN,
    INT5K_MIN,
    INT6K,
    INT8,
    SUPER,
)
from minilora_kernels.quantized import Quantized, dequantize


@dataclass(frozen=True)
class BlockType:
    """A ggml type: `values` numbers in `size` bytes. decode: uint8 [rows, blocks, size] -> what it stands for.

    format, group: what it becomes.
    """

    name: str
    values: int
    size: int
    format: int
    decode: Callable[[np.ndarray], Quantized | np.ndarray]
    group: int = 0

    def blocks(self, raw: np.ndarray) -> np.ndarray:
        """uint8 [rows, bytes] as [rows, blocks, size]."""
        return raw.reshape(len(raw), -1, self.size)

    def weights(self, raw: np.ndarray) -> Quantized | np.ndarray:
        """Rows of raw bytes as Quantized, or float32 [rows, columns] if they are floating-point numbers."""
        return self.decode(self.blocks(raw))

    def floats(self, raw: np.ndarray) -> np.ndarray:
        """Rows of raw bytes as float32, exactly as the type defines them."""
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


def _nested(
    values: np.ndarray, scales: np.ndarray, minima: np.ndarray | None, width: int, units: np.ndarray
) -> Quantized:
    """A K-quant. scales, minima: bytes; units: float16 [rows, blocks, 1 or 2], d and dmin: minima count in -dmin."""
    signs = np.array([1, -1], np.float16)[: units.shape[2]]
    signed = None if minima is None else minima.view(np.int8)
    return _quantized(values, scales.view(np.int8), signed, width)._replace(units=units * signs)


def _decode_q2_k(blocks: np.ndarray) -> Quantized:
    """16 bytes of scale and minimum nibbles, 64 of values, d and dmin."""
    nibbles, units = blocks[..., :16], _half(blocks[..., 80:84])
    return _nested(_bit_fields(blocks[..., 16:80], 2, 32), nibbles & 15, nibbles >> 4, 2, units)


def _decode_q3_k(blocks: np.ndarray) -> Quantized:
    """32 bytes of third bits, 64 of low bits, 12 of 6-bit scales, d; values 4 .. 11 for -4 .. 3."""
    values = _bit_fields(blocks[..., 32:96], 2, 32) | _bit_fields(blocks[..., :32], 1, 32) << 2
    scales = _bit_fields(blocks[..., 96:104], 4, 8) | _bit_fields(blocks[..., 104:108], 2, 4) << 4
    return _nested(values + np.uint8(4), scales - np.uint8(32), None, 4, _half(blocks[..., 108:110]))


def _decode_q4_k(blocks: np.ndarray) -> Quantized:
    """d and dmin, 12 bytes of 6-bit scales and minima, 128 of nibbles."""
    return _nested(_bit_fields(blocks[..., 16:], 4, 32), *_six_bit_pairs(blocks[..., 4:16]), 4, _half(blocks[..., :4]))


def _decode_q5_k(blocks: np.ndarray) -> Quantized:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles."""
    values = _bit_fields(blocks[..., 48:], 4, 32) | _bit_fields(blocks[..., 16:48], 1, 32) << 4
    return _nested(values, *_six_bit_pairs(blocks[..., 4:16]), 5, _half(blocks[..., :4]))


def _decode_q6_k(blocks: np.ndarray) -> Quantized:
    """128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, d; values 0 .. 63 for -32 .. 31."""
    values = _bit_fields(blocks[..., :128], 4, 64) | _bit_fields(blocks[..., 128:192], 2, 32) << 4
    return _nested(values, blocks[..., 192:208], None, 6, _half(blocks[..., 208:210]))


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, FLOAT32, _float_decoder(np.float32)),
    1: BlockType("F16", 1, 2, FLOAT16, _float_decoder(np.float16)),
    2: BlockType("Q4_0", 32, 18, INT4, _decode_q4_0, 32),
    3: BlockType("Q4_1", 32, 20, INT4_MIN, _decode_q4_1, 32),
    6: BlockType("Q5_0", 32, 22, INT5, _decode_q5_0, 32),
    7: BlockType("Q5_1", 32, 24, INT5_MIN, _decode_q5_1, 32),
    8: BlockType("Q8_0", 32, 34, INT8, _decode_q8_0, 32),
    10: BlockType("Q2_K", SUPER, 84, INT2K_MIN, _decode_q2_k, 16),
    11: BlockType("Q3_K", SUPER, 110, INT4K, _decode_q3_k, 16),
    12: BlockType("Q4_K", SUPER, 144, INT4K_MIN, _decode_q4_k, 32),
    13: BlockType("Q5_K", SUPER, 176, INT5K_MIN, _decode_q5_k, 32),
    14: BlockType("Q6_K", SUPER, 210, INT6K, _decode_q6_k, 16),
    30: BlockType("BF16", 1, 2, BFLOAT16, _decode_bf16),
}
