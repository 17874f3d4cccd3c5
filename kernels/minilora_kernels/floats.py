"""float16 and bfloat16 numbers in NumPy, which has no bfloat16: its 16 bits are held as uint16."""

import numpy as np

from .formats import BFLOAT16, BFLOAT16_INPUTS, FLOAT16, FLOAT32, FORMAT_NAMES

# Formats that hold bfloat16, and the largest finite number of each format.
BFLOATS = (BFLOAT16, BFLOAT16_INPUTS)
LARGEST = {FLOAT32: float(np.finfo(np.float32).max), FLOAT16: 65504.0, **dict.fromkeys(BFLOATS, 3.3895313892515355e38)}


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


def narrow_float16(x: np.ndarray) -> np.ndarray:
    """float32 as float16, rounded to nearest. Raises OverflowError where a number is too large, NaN stays NaN."""
    check_largest(x, FLOAT16)
    return x.astype(np.float16)


def encode(x: np.ndarray, fmt: int) -> np.ndarray:
    """float32 as a floating-point format holds them. Raises OverflowError where a number is too large."""
    check_largest(x, fmt)
    if fmt == FLOAT16:
        return x.astype(np.float16)
    return narrow_bfloat16(x) if fmt in BFLOATS else x.astype(np.float32, copy=False)


def decode(raw: np.ndarray, fmt: int) -> np.ndarray:
    """The inverse: float32 of the bytes of a floating-point format."""
    if fmt == FLOAT16:
        return raw.view(np.float16).astype(np.float32)
    return widen_bfloat16(raw.view(np.uint16)) if fmt in BFLOATS else raw.view(np.float32)
